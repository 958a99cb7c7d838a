"""Writing a checkpoint that holds weights and no optimiser state: what `checkpoint.weights_from` begins with. Needs no ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lime_dist.checkpoint.checking import FORMAT
from lime_dist.checkpoint.reader import flush_to_disk, write_json
from lime_dist.config import Config, to_dict
from lime_dist.errors import CheckpointError, one_line
from lime_dist.plan.tensors import LogicalTensor

_FILE_BYTES = 2 * 2**30  # about as much is in memory


def write_weights(folder: Path, config: Config, tensors: Iterable[tuple[LogicalTensor, numpy.ndarray]]) -> None:
    """All logical tensors of the model of `config`, whole and fp32, as a checkpoint of step 0.

    Raises: CheckpointError when the disk takes no more.
    """
    folder.mkdir(parents=True)
    stems: list[str] = []
    held: list[tuple[LogicalTensor, numpy.ndarray]] = []
    for tensor, values in tensors:
        if held and sum(other.nbytes for _, other in held) + values.nbytes > _FILE_BYTES:
            stems.append(_write_file(folder, len(stems), held))
            held = []
        held.append((tensor, values))
    stems.append(_write_file(folder, len(stems), held))
    meta = {"format": FORMAT, "step": 0, "samples_seen": 0, "config": to_dict(config), "files": stems}
    write_json(folder / "meta.json", meta)
    flush_to_disk(folder)


def _write_file(folder: Path, number: int, held: list[tuple[LogicalTensor, numpy.ndarray]]) -> str:
    stem = f"part{number:03d}"
    keys = {f"weight:{tensor.name}@0": (tensor, values) for tensor, values in held}
    try:
        save_file({key: values for key, (_, values) in keys.items()}, folder / f"{stem}.safetensors")
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {folder}: {one_line(error)}; free space or name another folder") from None
    flush_to_disk(folder / f"{stem}.safetensors")
    places = {key: {"dim": 0, "start": 0, "shape": list(tensor.shape)} for key, (tensor, _) in keys.items()}
    write_json(folder / f"{stem}.json", places)
    return stem
