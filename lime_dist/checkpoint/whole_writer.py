"""Writing a checkpoint without ranks, tensor by tensor: what one is converted, averaged or imported into."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy
from safetensors import SafetensorError

from lime_dist.checkpoint.boxes import Box, Part, cut_into_chunks
from lime_dist.checkpoint.checking import FORMAT, meta_text
from lime_dist.checkpoint.chunk_files import chunk_key, write_chunks
from lime_dist.checkpoint.safe_files import brief, flush_to_disk, write_bytes
from lime_dist.config import Config, to_dict
from lime_dist.errors import CheckpointError
from lime_dist.plan.parameters import whole_pieces
from lime_dist.plan.tensors import LogicalTensor, Piece

Tensors = Iterable[tuple[str, LogicalTensor, numpy.ndarray]]  # kind, tensor, its values, fp32

_FILE_BYTES = 2**30  # about as much is in memory


def write_whole(folder: Path, config: Config, tensors: Tensors, *, step: int, samples_seen: int) -> None:
    """A checkpoint of the model of `config`, under a temporary name until it is whole.

    Raises: CheckpointError when there is something of that name, or the disk takes no more.
    """
    if os.path.lexists(folder):
        raise CheckpointError(f"--out: {folder} exists; choose another name")
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        files = dict(_write_files(unfinished, whole_pieces(config.model, config.pattern), tensors))
        meta = {"format": FORMAT, "step": step, "samples_seen": samples_seen, "files": files, "config": to_dict(config)}
        write_bytes(unfinished / "meta.json", meta_text(meta))
        flush_to_disk(unfinished)
        os.rename(unfinished, folder)
        flush_to_disk(folder.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        raise CheckpointError(f"--out: {folder}: {brief(error)}; free space or name another folder") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write_files(folder: Path, pieces: Mapping[str, Piece], tensors: Tensors) -> Iterator[tuple[str, str]]:
    """Stems, and the checksums of their indexes."""
    held: dict[str, numpy.ndarray] = {}
    number = held_bytes = 0
    for kind, tensor, values in tensors:
        if held and held_bytes + values.nbytes > _FILE_BYTES:
            yield _stem(number), write_chunks(folder, _stem(number), held)
            held, held_bytes, number = {}, 0, number + 1
        held |= _chunks(kind, pieces[tensor.name], values)
        held_bytes += values.nbytes
    yield _stem(number), write_chunks(folder, _stem(number), held)


def _stem(number: int) -> str:
    return f"part{number:04d}"


def _chunks(kind: str, piece: Piece, values: numpy.ndarray) -> Iterator[tuple[str, numpy.ndarray]]:
    tensor = piece.tensor
    whole = Box((0,) * len(tensor.shape), tensor.shape)
    for chunk in cut_into_chunks(Part(tensor, piece.dim, whole, whole)):
        yield chunk_key(kind, tensor.name, chunk.logical), numpy.ascontiguousarray(values[chunk.logical.slices()])
