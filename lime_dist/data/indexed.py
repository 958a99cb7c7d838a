"""Token files in the format of Megatron's IndexedDataset: `PREFIX.bin` and `PREFIX.idx`, with our `PREFIX.meta.json`.

A file may have a loss mask, `PREFIX.mask`: a byte a token, 1 where the token is a target of training and 0 elsewhere.

Writing goes through megatron-core. Reading needs NumPy alone: a login node checks a run without torch, and arrays
stay valid for as long as they are held (megatron's reader unmaps the file under the arrays that it gave out).
Files made by Megatron's own tools work too; they lack the meta file.
"""

from __future__ import annotations

import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lime_dist.data.checksums import block_digest
from lime_dist.data.meta import TokenMeta, find_meta, meta_text
from lime_dist.data.output_files import partial_path, prepare_outputs
from lime_dist.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# Magic, version, dtype code, number of sequences, number of document bounds (documents + 1).
_HEADER = struct.Struct("<9sQBQQ")
_INTEGER_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_OTHER_DTYPES = {6: "float64", 7: "float32"}
_LENGTH_BYTES, _POINTER_BYTES, _BOUND_BYTES = 4, 8, 8
AGAIN = "run lime-dist data tokenize again"
_TASK_AGAIN = "run lime-dist data build-task again"
_MASK_BLOCK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class TokenFiles:
    """What the index and the meta file say of one token file.

    document_bounds: int64 [num_documents + 1]; document i is tokens bounds[i] to bounds[i + 1], that one not included.
    meta: None for files of Megatron's own tools.
    has_mask: whether there is a loss mask beside them.
    """

    prefix: str
    dtype: np.dtype
    document_bounds: np.ndarray
    num_sequences: int
    meta: TokenMeta | None
    has_mask: bool = False

    @property
    def num_documents(self) -> int:
        return len(self.document_bounds) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.document_bounds[-1])

    @property
    def vocab_size(self) -> int | None:
        return self.meta.vocab_size if self.meta is not None else None

    @property
    def tokenizer_sha256(self) -> str | None:
        return self.meta.tokenizer_sha256 if self.meta is not None else None

    @property
    def task(self) -> str | None:
        return self.meta.task if self.meta is not None else None

    @property
    def has_checksums(self) -> bool:
        return self.meta is not None and self.meta.checksums is not None


def check_files(prefix: str, *, key: str = "data.train", reads_meta: bool = True) -> TokenFiles:
    """Check that the files at `prefix` are whole and belong together.

    Takes about a second for 50 million documents: checksums are of sampled blocks (`checksums.py`), and the index
    is read with NumPy to see that its three lists agree. Imports neither torch nor megatron.
    `key` is the configuration key that errors name. reads_meta: else the files count as ones of Megatron's own tools.
    Raises: DataError when a file is missing, cut short, of another format, or not of the same data as the others.
    """
    bin_path, idx_path, mask_path, meta_path = _paths(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            problem = "is not a file" if path.exists() else "does not exist"
            raise DataError(f"{key}: {path} {problem}; make it with lime-dist data tokenize or correct the path")
        if not os.access(path, os.R_OK):
            raise DataError(f"{key}: {path} may not be read; change its permissions")
    try:
        index = _read_index(idx_path, key)
        _check_tokens(bin_path, index.num_bytes, key)
        meta = find_meta(meta_path, key=key) if reads_meta else None
        if reads_meta and (meta is None or meta.checksums is None) and index.has_unlikely_bounds():
            raise DataError(
                f"{key}: {idx_path} contradicts itself; {AGAIN}, or lime-dist data adopt if documents may be empty"
            )
        has_mask = _check_mask(mask_path, meta, index.num_bytes // index.dtype.itemsize, key)
        if meta is not None:
            _check_meta(prefix, meta, index.num_bytes // index.dtype.itemsize, key)
    except OSError as error:
        raise DataError(f"{key}: {error.filename or prefix} cannot be read ({error.strerror}); copy it again") from None
    return TokenFiles(
        prefix=prefix,
        dtype=index.dtype,
        document_bounds=index.document_bounds(),
        num_sequences=len(index.lengths),
        meta=meta,
        has_mask=has_mask,
    )


def open_tokens(files: TokenFiles) -> np.ndarray:
    """The token ids of all documents, one after the other: [num_tokens], of the stored dtype, memory-mapped."""
    return np.memmap(_paths(files.prefix)[0], dtype=files.dtype, mode="r")


def open_mask(files: TokenFiles) -> np.ndarray:
    """The loss mask of files that have one: uint8 [num_tokens], memory-mapped."""
    return np.memmap(_paths(files.prefix)[2], dtype=np.uint8, mode="r")


class IndexedWriter:
    """Writes one token file; the files appear under their names when `commit` is called, and not before.

    Use as a context manager: leaving the block removes what was not committed.
    masked: a loss mask is written too, of which each document brings its part.
    Raises: DataError when the files exist and `overwrite` is not set.
    """

    def __init__(self, prefix: Path, *, vocab_size: int, overwrite: bool = False, masked: bool = False) -> None:
        self._paths = _paths(str(prefix))
        prepare_outputs(self._paths, overwrite=overwrite)
        self._partials = tuple(map(partial_path, self._paths))
        self._mask = self._partials[2].open("wb") if masked else None
        megatron = _megatron()
        self.dtype = np.dtype(megatron.DType.optimal_dtype(vocab_size))
        self._builder = megatron.IndexedDatasetBuilder(str(self._partials[0]), dtype=self.dtype.type)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.data_file.close()
        if self._mask is not None:
            self._mask.close()
        for partial in self._partials:
            partial.unlink(missing_ok=True)

    def add_document(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append one document: token ids [num_tokens] of any integer dtype, of masked files with its mask."""
        assert (mask is None) == (self._mask is None)
        self._builder.add_document(tokens, [len(tokens)])
        if self._mask is not None and mask is not None:
            assert len(mask) == len(tokens)
            self._mask.write(mask.astype(np.uint8).tobytes())

    def commit(self, meta: dict[str, Any]) -> None:
        """Finish the files; `meta` gets their checksums. The `.idx` goes away first and comes back last: without it the others count as missing."""
        bin_path, idx_path, mask_path, meta_path = self._paths
        bin_partial, idx_partial, mask_partial, meta_partial = self._partials
        self._builder.finalize(str(idx_partial))
        checksums = {"bin": block_digest(bin_partial), "idx": block_digest(idx_partial)}
        if self._mask is not None:
            self._mask.close()
            checksums["mask"] = block_digest(mask_partial)
        meta_partial.write_text(meta_text(meta, checksums))
        idx_path.unlink(missing_ok=True)
        mask_path.unlink(missing_ok=True)  # of files that had one before
        bin_partial.replace(bin_path)
        if self._mask is not None:
            mask_partial.replace(mask_path)
        meta_partial.replace(meta_path)
        idx_partial.replace(idx_path)


def _paths(prefix: str) -> tuple[Path, Path, Path, Path]:
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.mask"), Path(f"{prefix}.meta.json")


def _megatron() -> ModuleType:
    with warnings.catch_warnings():  # megatron-core warns of each optional package that is missing
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


@dataclass(frozen=True)
class _Index:
    """A document is one or more sequences; the index has each sequence's length and place, each document's first one.

    lengths: int32 [sequences], in tokens. pointers: int64 [sequences], in bytes. bounds: int64 [documents + 1].
    """

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    bounds: np.ndarray

    @property
    def num_bytes(self) -> int:
        """What the `.bin` must have."""
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize

    def document_bounds(self) -> np.ndarray:
        starts = np.append(self.pointers, self.num_bytes)
        bounds: np.ndarray = starts[self.bounds] // self.dtype.itemsize
        return bounds

    def contradicts_itself(self) -> bool:
        """Whether sequences do not follow one another without a gap, or documents do not take them all in order."""
        ends = np.multiply(self.lengths, self.dtype.itemsize, dtype=np.int64)
        ends += self.pointers
        before, after = self.bounds[:-1], self.bounds[1:]
        return bool(
            (self.lengths < 0).any()
            or self.pointers[0] != 0
            or (self.pointers[1:] != ends[:-1]).any()
            or self.bounds[0] != 0
            or self.bounds[-1] != len(self.lengths)
            or (after < before).any()
        )

    def has_unlikely_bounds(self) -> bool:
        """Whether as many documents as sequences are not one each: one is empty and another has two.

        Damage that shifts a bound looks like this, and so may a text of empty documents that was split into sentences.
        """
        before, after = self.bounds[:-1], self.bounds[1:]
        return bool(len(after) == len(self.lengths) and (after == before).any())


def _read_index(path: Path, key: str) -> _Index:
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
        if header[: len(_MAGIC)] != _MAGIC:
            raise DataError(f"{key}: {path} is not a Megatron .idx file; {AGAIN}")
        if len(header) < _HEADER.size:
            raise DataError(f"{key}: {path} ends within its header; {AGAIN}")
        _, version, dtype_code, num_sequences, num_bounds = _HEADER.unpack(header)
        if version != _VERSION or dtype_code not in _INTEGER_DTYPES:
            found = f"version {version}, dtype code {dtype_code} ({_OTHER_DTYPES.get(dtype_code, 'unknown')})"
            raise DataError(
                f"{key}: {path} has {found}; what can be read is version {_VERSION} with whole numbers; {AGAIN}"
            )
        end = _HEADER.size + (_LENGTH_BYTES + _POINTER_BYTES) * num_sequences + _BOUND_BYTES * num_bounds
        if num_sequences and file_bytes == end + num_sequences:
            raise DataError(
                f"{key}: {path} has a mode for each sequence, as data of several modalities has; give token files of text alone"
            )
        if file_bytes != end:
            raise DataError(f"{key}: {path} has {file_bytes} bytes, its header says {end}; {AGAIN}")
        if num_sequences == 0 or num_bounds < 2:
            raise DataError(f"{key}: {path} holds no documents; {AGAIN} on text")
        index = _Index(
            np.dtype(_INTEGER_DTYPES[dtype_code]),
            np.fromfile(stream, "<i4", num_sequences),
            np.fromfile(stream, "<i8", num_sequences),
            np.fromfile(stream, "<i8", num_bounds),
        )
    if index.contradicts_itself():
        raise DataError(f"{key}: {path} contradicts itself; {AGAIN}")
    return index


def _check_tokens(path: Path, num_bytes: int, key: str) -> None:
    found = path.stat().st_size
    if found != num_bytes:
        raise DataError(f"{key}: {path} has {found} bytes, its .idx says {num_bytes}; {AGAIN}")
    if num_bytes == 0:
        raise DataError(f"{key}: {path} holds no tokens; {AGAIN} on text")


def _check_mask(path: Path, meta: TokenMeta | None, num_tokens: int, key: str) -> bool:
    """Whether there is one; what its checksum says is `_check_meta`'s."""
    checksums = meta.checksums if meta is not None else None
    if not path.exists():
        if checksums is not None and "mask" in checksums:
            raise DataError(
                f"{key}: {path} does not exist, and the meta file has its checksum; copy it or {_TASK_AGAIN}"
            )
        return False
    if checksums is not None and "mask" not in checksums:
        raise DataError(f"{key}: {path} is not of these tokens (the meta file has no checksum of a mask); remove it")
    found = path.stat().st_size
    if found != num_tokens:
        raise DataError(f"{key}: {path} has {found} bytes, the .idx {num_tokens} tokens; {_TASK_AGAIN}")
    mask = np.memmap(path, dtype=np.uint8, mode="r")
    largest = max(int(mask[start : start + _MASK_BLOCK].max()) for start in range(0, num_tokens, _MASK_BLOCK))
    if largest > 1:
        raise DataError(f"{key}: {path} has bytes other than 0 and 1; {_TASK_AGAIN}")
    if largest == 0:  # a loss of 0 at every step
        raise DataError(
            f"{key}: {path} has no target, as all its bytes are 0; {_TASK_AGAIN}, or remove it to train on all tokens"
        )
    return True


def _check_meta(prefix: str, meta: TokenMeta, num_tokens: int, key: str) -> None:
    meta_path = _paths(prefix)[3]
    if meta.num_tokens != num_tokens:
        raise DataError(f"{key}: {meta_path} is of {meta.num_tokens} tokens, the .idx of {num_tokens}; {AGAIN}")
    for suffix, expected in (meta.checksums or {}).items():
        if block_digest(Path(f"{prefix}.{suffix}")) != expected:
            raise DataError(
                f"{key}: {prefix}.{suffix} is not as it was written (its checksum in {meta_path.name} differs); "
                f"copy it again or {AGAIN}"
            )
