"""The files of a checkpoint, and reading logical tensors out of them. Needs no ranks and no torch.

    step_000100/
      meta.json             step, samples read, spikes met, the resolved config, the files; written last
      pp00-tp00.safetensors fp32 slices that this rank owns, keyed KIND:NAME@START
      pp00-tp00.json        for each key: dim, start and the whole shape

KIND is weight, exp_avg or exp_avg_sq; NAME a logical tensor's. A slice lies in one file only.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open

from lime_dist.checkpoint.checking import (
    STEP_NAME,
    Slice,
    brief,
    checked_config,
    checked_slices,
    read_json,
    read_meta,
    refuse,
)
from lime_dist.errors import CheckpointError
from lime_dist.plan.tensors import LogicalTensor


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def find_checkpoints(checkpoints: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [
        path for path in checkpoints.iterdir() if STEP_NAME.fullmatch(path.name) and (path / "meta.json").is_file()
    ]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The steps done before this checkpoint, by its name."""
    return int(folder.name.removeprefix("step_"))


def find_latest(checkpoints: Path) -> Path | None:
    found = find_checkpoints(checkpoints)
    return found[-1] if found else None


def find_before(checkpoints: Path, step: int) -> Path | None:
    """The newest one that step `step` (from 1) has not touched."""
    return next((path for path in reversed(find_checkpoints(checkpoints)) if step_of(path) < step), None)


def find_checkpoint(path: Path) -> Path | None:
    """A step_N folder itself, or the newest one of a run's folder."""
    if (path / "meta.json").is_file():
        return path
    return find_latest(path / "checkpoints") or find_latest(path)


def set_aside_after(checkpoints: Path, step: int) -> None:
    """Rename checkpoints of later steps: a run that goes on from `step` has left their branch, and must not return to it."""
    for folder in find_checkpoints(checkpoints):
        if step_of(folder) > step:
            os.replace(folder, folder.with_name(f"abandoned-{time.time_ns()}-{folder.name}"))


def write_json(path: Path, value: Any) -> None:
    """Written through to the disk, so that a rename after it never uncovers an empty file."""
    with path.open("w") as file:
        json.dump(value, file)
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointReader:
    """Logical tensors from a checkpoint's slices, whatever layout wrote them."""

    def __init__(self, folder: Path):
        """Checks all that the files say, and that they are as large as that. Raises: CheckpointError."""
        self.folder, self.meta = folder, read_meta(folder)
        places = {stem: read_json(folder / f"{stem}.json") for stem in self.meta.files}
        for stem, keys in places.items():
            if not isinstance(keys, dict):
                refuse(folder / f"{stem}.json", "no mapping of tensors")
        self.config = checked_config(folder, self.meta, places)  # of the run that wrote it
        self._slices = checked_slices(folder, self.config, places)

    def array(self, kind: str, logical: LogicalTensor) -> numpy.ndarray:
        """fp32, whole. Raises: CheckpointError when it is missing, damaged or of another shape."""
        key = f"{kind}:{logical.name}"
        if key not in self._slices:
            raise CheckpointError(
                f"checkpoint {self.folder}: no {key}; it is of another model or without optimiser state"
            )
        parts = self._slices[key]
        dim = parts[0].dim
        shape = (*parts[0].shape[:dim], sum(part.shape[dim] for part in parts), *parts[0].shape[dim + 1 :])
        if shape != logical.shape:
            raise CheckpointError(
                f"checkpoint {self.folder}: {logical.name} has shape {list(shape)}, the model {list(logical.shape)}; "
                "use the checkpoint's model and depth keys"
            )
        whole = numpy.empty(shape, dtype=numpy.float32)
        for part in parts:
            whole[(slice(None),) * dim + (slice(part.start, part.start + part.shape[dim]),)] = self._read(part)
        return whole

    def _read(self, part: Slice) -> numpy.ndarray:
        path = self.folder / f"{part.stem}.safetensors"
        try:
            with safe_open(path, framework="np") as file:
                view = file.get_slice(part.key)
                found = view.get_dtype(), tuple(view.get_shape())
                if found != ("F32", part.shape):
                    refuse(path, f"{part.key} is {found[0]} {list(found[1])}, not F32 {list(part.shape)}")
                return file.get_tensor(part.key)
        except (OSError, SafetensorError) as error:
            refuse(path, brief(error))
