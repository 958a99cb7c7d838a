"""Token files in the format of Megatron's IndexedDataset: `PREFIX.bin` and `PREFIX.idx`, with our `PREFIX.meta.json`.

Writing goes through megatron-core. Reading needs NumPy alone: a login node checks a run without torch, and arrays
stay valid for as long as they are held (megatron's reader unmaps the file under the arrays that it gave out).
Files made by Megatron's own tools work too; they lack the meta file.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np

from lime_dist.data.files import partial_path, prepare_outputs
from lime_dist.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Magic, version, dtype code, number of sequences, number of document bounds (documents + 1).
_HEADER = struct.Struct("<9sQBQQ")
_INTEGER_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_LENGTH_BYTES, _POINTER_BYTES, _BOUND_BYTES = 4, 8, 8
_AGAIN = "run lime-dist data tokenize again"


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """What the headers say of one token file; `vocab_size` is None without a meta file."""

    prefix: str
    dtype: np.dtype
    num_documents: int
    num_sequences: int
    num_tokens: int
    vocab_size: int | None


def check_files(prefix: str, *, key: str = "data.train") -> TokenFiles:
    """Check that the files at `prefix` are whole and belong together, at a cost that does not grow with their size.

    Imports neither torch nor megatron. `key` is the configuration key that errors name.
    Raises: DataError when a file is missing, cut short, of another format, or not of the same data as the others.
    """
    bin_path, idx_path, meta_path = _paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(f"{key}: {path} does not exist; make it with lime-dist data tokenize or correct the path")
        if not os.access(path, os.R_OK):
            raise DataError(f"{key}: {path} may not be read; change its permissions")
    with idx_path.open("rb") as stream:
        dtype, num_sequences, num_documents, token_bytes = _read_index(stream, idx_path, key)
    bin_bytes = bin_path.stat().st_size
    if bin_bytes != token_bytes:
        raise DataError(f"{key}: {bin_path} has {bin_bytes} bytes, its .idx says {token_bytes}; {_AGAIN}")
    num_tokens = token_bytes // dtype.itemsize
    if num_tokens == 0:
        raise DataError(f"{key}: {bin_path} holds no tokens; {_AGAIN} on text")
    return TokenFiles(
        prefix=prefix,
        dtype=dtype,
        num_documents=num_documents,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        vocab_size=_find_vocab_size(meta_path, num_tokens, key),
    )


def open_tokens(files: TokenFiles) -> np.ndarray:
    """The token ids of all documents, one after the other: [num_tokens], of the stored dtype, memory-mapped."""
    return np.memmap(_paths(files.prefix)[0], dtype=files.dtype, mode="r")


def read_document_bounds(files: TokenFiles, *, key: str = "data.train") -> np.ndarray:
    """int64 [num_documents + 1]: document i is tokens bounds[i] to bounds[i + 1], that one not included.

    Raises: DataError when the index does not cover the tokens in order.
    """
    idx_path = _paths(files.prefix)[1]
    # A document is one or more sequences; the index has each sequence's length and each document's first sequence.
    lengths = np.fromfile(idx_path, np.int32, files.num_sequences, offset=_HEADER.size)
    bounds_at = _HEADER.size + (_LENGTH_BYTES + _POINTER_BYTES) * files.num_sequences
    sequence_bounds = np.fromfile(idx_path, np.int64, files.num_documents + 1, offset=bounds_at)
    token_bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    in_order = (lengths >= 0).all() and sequence_bounds[0] == 0 and (np.diff(sequence_bounds) >= 0).all()
    if not in_order or token_bounds[-1] != files.num_tokens:
        raise DataError(f"{key}: {idx_path} contradicts itself; {_AGAIN}")
    return token_bounds[sequence_bounds]


class IndexedWriter:
    """Writes one token file; the files appear under their names when `commit` is called, and not before.

    Use as a context manager: leaving the block removes what was not committed.
    Raises: DataError when the files exist and `overwrite` is not set.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, overwrite: bool = False) -> None:
        self._paths = _paths(str(prefix))
        prepare_outputs(self._paths, overwrite=overwrite)
        self._partials = tuple(map(partial_path, self._paths))
        megatron = _megatron()
        self.dtype = np.dtype(megatron.DType.optimal_dtype(vocab_size))
        self._builder = megatron.IndexedDatasetBuilder(str(self._partials[0]), dtype=self.dtype.type)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.data_file.close()
        for partial in self._partials:
            partial.unlink(missing_ok=True)

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document: token ids [num_tokens] of any integer dtype."""
        self._builder.add_document(tokens, [len(tokens)])

    def commit(self, meta: dict[str, Any]) -> None:
        """Finish the files. The `.idx` goes away first and comes back last: without it the others count as missing."""
        bin_path, idx_path, meta_path = self._paths
        bin_partial, idx_partial, meta_partial = self._partials
        self._builder.finalize(str(idx_partial))
        meta_partial.write_text(json.dumps(meta, indent=2) + "\n")
        idx_path.unlink(missing_ok=True)
        bin_partial.replace(bin_path)
        meta_partial.replace(meta_path)
        idx_partial.replace(idx_path)


def _paths(prefix: str) -> tuple[Path, Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.meta.json")


def _megatron() -> ModuleType:
    with warnings.catch_warnings():  # megatron-core warns of each optional package that is missing
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _read_index(stream: BinaryIO, path: Path, key: str) -> tuple[np.dtype, int, int, int]:
    """(dtype, sequences, documents, bytes that the `.bin` must have), from the header and the last entries."""
    file_bytes = path.stat().st_size
    header = stream.read(_HEADER.size)
    if header[: len(_MAGIC)] != _MAGIC:
        raise DataError(f"{key}: {path} is not a Megatron .idx file; {_AGAIN}")
    if len(header) < _HEADER.size:
        raise DataError(f"{key}: {path} ends within its header; {_AGAIN}")
    _, version, dtype_code, num_sequences, num_bounds = _HEADER.unpack(header)
    if version != _VERSION or dtype_code not in _INTEGER_DTYPES:
        raise DataError(f"{key}: {path} has version {version} and dtype code {dtype_code}, not known here; {_AGAIN}")
    lengths_end = _HEADER.size + _LENGTH_BYTES * num_sequences
    pointers_end = lengths_end + _POINTER_BYTES * num_sequences
    bounds_end = pointers_end + _BOUND_BYTES * num_bounds
    if file_bytes != bounds_end:
        raise DataError(f"{key}: {path} has {file_bytes} bytes, its header says {bounds_end}; {_AGAIN}")
    if num_sequences == 0 or num_bounds < 2:
        raise DataError(f"{key}: {path} holds no documents; {_AGAIN} on text")
    (last_length,) = _unpack_before(stream, lengths_end, "<i")
    (last_pointer,) = _unpack_before(stream, pointers_end, "<q")
    (last_bound,) = _unpack_before(stream, bounds_end, "<q")
    if last_bound != num_sequences or last_length < 0 or last_pointer < 0:
        raise DataError(f"{key}: {path} contradicts itself; {_AGAIN}")
    dtype = np.dtype(_INTEGER_DTYPES[dtype_code])
    return dtype, num_sequences, num_bounds - 1, last_pointer + last_length * dtype.itemsize


def _unpack_before(stream: BinaryIO, end: int, code: str) -> tuple[int, ...]:
    size = struct.calcsize(code)
    stream.seek(end - size)
    return struct.unpack(code, stream.read(size))


def _find_vocab_size(path: Path, num_tokens: int, key: str) -> int | None:
    """The vocabulary size in the meta file, or None without one. Raises: DataError when it is not of these tokens."""
    if not path.is_file():
        return None
    try:
        meta = json.loads(path.read_text())
        vocab_size, meta_tokens = int(meta["vocab_size"]), int(meta["tokens"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{key}: {path} does not state vocab_size and tokens; {_AGAIN}") from None
    if meta_tokens != num_tokens:
        raise DataError(f"{key}: {path} is of {meta_tokens} tokens, the .idx of {num_tokens}; {_AGAIN}")
    return vocab_size
