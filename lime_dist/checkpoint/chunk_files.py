"""Chunks of tensors in files: a safetensors file, and beside it an index in JSON that says where each chunk belongs.

    KIND:NAME@OFFSET,OFFSET     the key: of a tensor, and the first element of the chunk in it

A chunk is what is read and verified as one. Needs no ranks and no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lime_dist.checkpoint.boxes import Box
from lime_dist.checkpoint.safe_files import brief, file_size, flush_to_disk, refuse, write_bytes
from lime_dist.data.output_files import with_usual_rights


@dataclass(frozen=True)
class Chunk:
    """The tensor `key` of the file `stem`: `box` of a logical tensor. sha256: of its bytes; None in files of format 1."""

    stem: str
    key: str
    box: Box
    sha256: str | None


def chunk_key(kind: str, name: str, box: Box) -> str:
    return f"{kind}:{name}@{','.join(map(str, box.offsets))}"


def tensor_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.safetensors"


def index_path(folder: Path, stem: str) -> Path:
    return folder / f"{stem}.json"


def write_chunks(folder: Path, stem: str, chunks: Mapping[str, numpy.ndarray]) -> str:
    """Both files, through to the disk; returns the checksum of the index. chunks: key -> values, fp32 and contiguous."""
    with with_usual_rights(tensor_path(folder, stem)):
        save_file(dict(chunks), tensor_path(folder, stem))
    flush_to_disk(tensor_path(folder, stem))
    index = {key: {"sizes": list(values.shape), "sha256": _digest(values)} for key, values in chunks.items()}
    content = json.dumps(index).encode()
    write_bytes(index_path(folder, stem), content)
    return hashlib.sha256(content).hexdigest()


class ChunkFiles:
    """The tensor files of a checkpoint, each opened once: a header names thousands of chunks."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, Any] = {}
        self.bytes_read = 0  # of tensors

    def read(self, chunk: Chunk) -> numpy.ndarray:
        """fp32, verified. Raises: CheckpointError when it is missing or damaged."""
        path = tensor_path(self._folder, chunk.stem)
        try:
            file = self._file(chunk.stem)
            view = file.get_slice(chunk.key)
            found = view.get_dtype(), tuple(view.get_shape())
            if found != ("F32", chunk.box.sizes):
                refuse(path, f"{chunk.key} is {found[0]} {list(found[1])}, not F32 {list(chunk.box.sizes)}")
            values: numpy.ndarray[Any, Any] = file.get_tensor(chunk.key)
        except (OSError, SafetensorError) as error:
            refuse(path, brief(error))
        self.bytes_read += values.nbytes
        if chunk.sha256 is not None and _digest(values) != chunk.sha256:
            refuse(path, f"{chunk.key} is damaged: its checksum is another")
        return values

    def _file(self, stem: str) -> Any:
        if stem not in self._open:
            path = tensor_path(self._folder, stem)
            file_size(path)
            self._open[stem] = safe_open(path, framework="np")
        return self._open[stem]


def _digest(values: numpy.ndarray) -> str:
    return hashlib.sha256(values.view(numpy.uint8).data if values.size else b"").hexdigest()
