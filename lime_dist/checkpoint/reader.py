"""The folders of checkpoints, and reading logical tensors out of one. Needs no ranks and no torch.

    step_000100/
      meta.json                     step, samples read, spikes met, the resolved config, the files and their checksums; written last
      pp00-tp00-dp000.safetensors   fp32 chunks of what this rank owns (`chunk_files.py`)
      pp00-tp00-dp000.json          where they belong, and their checksums

KIND is weight, exp_avg or exp_avg_sq; NAME a logical tensor's. A chunk lies in one file only.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy

from lime_dist.checkpoint.checking import (
    FIRST_FORMAT,
    STEP_NAME,
    checked_chunks,
    checked_config,
    read_indexes,
    read_meta,
)
from lime_dist.checkpoint.chunk_files import Chunk, ChunkFiles
from lime_dist.errors import CheckpointError
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import KINDS, LogicalTensor

UNFINISHED = ".unfinished-"  # what has this before its name goes with the next save
REPLACED = ".replaced-"  # a whole one, of which there is a newer one under its own name, or soon will be


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


def find_run(folder: Path) -> Path | None:
    """The folder of the run whose checkpoint this is; None for one that lies elsewhere."""
    checkpoints = folder.absolute().parent
    return checkpoints.parent if checkpoints.name == "checkpoints" else None


def find_latest(checkpoints: Path) -> Path | None:
    found = find_checkpoints(checkpoints)
    return found[-1] if found else None


def find_before(checkpoints: Path, step: int) -> Path | None:
    """The newest sound one that step `step` (from 1) has not touched."""
    earlier = (path for path in reversed(find_checkpoints(checkpoints)) if step_of(path) < step)
    return next((path for path in earlier if problem_of(path) is None), None)


def find_checkpoint(path: Path) -> Path | None:
    """A step_N folder itself, or the newest one of a run's folder."""
    if (path / "meta.json").is_file():
        return path
    return find_latest(path / "checkpoints") or find_latest(path)


def get_checkpoint(path: Path, given_as: str = "checkpoint") -> Path:
    """As `find_checkpoint`; given_as: the key or the words before the path in a message. Raises: CheckpointError where there is none."""
    found = find_checkpoint(path)
    if found is None:
        raise CheckpointError(
            f"{given_as} {path}: neither a step_N folder nor a run's folder with one; train first, or correct the path"
        )
    return found


def find_sound(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files agree with one another, as far as shows without reading its tensors.

    Raises: CheckpointError, the newest one's, where there are some and none is: a run must not begin anew beside them.
    """
    newest_problem = None
    for folder in reversed(find_checkpoints(checkpoints)):
        if (problem := problem_of(folder)) is None:
            return folder
        newest_problem = newest_problem or problem
    if newest_problem is not None:
        raise newest_problem
    return None


def problem_of(folder: Path) -> CheckpointError | None:
    """What shows without reading its tensors."""
    try:
        CheckpointReader(folder)
    except CheckpointError as error:
        return error
    return None


def take_back_replaced(checkpoints: Path) -> None:
    """A checkpoint that was to be replaced by another of the same step, which never got its name."""
    for folder in checkpoints.glob(f"{REPLACED}step_*"):
        if not os.path.lexists(final := folder.with_name(folder.name.removeprefix(REPLACED))):
            os.rename(folder, final)


def set_aside_after(checkpoints: Path, step: int) -> list[str]:
    """Rename checkpoints of later steps: a run that goes on from `step` has left their branch, and must not return to it.

    Returns what is to be told of damaged ones, a line each.
    """
    later = [folder for folder in find_checkpoints(checkpoints) if step_of(folder) > step]
    lines = []
    for folder in later:
        problem = problem_of(folder)
        if problem is not None:
            lines.append(set_damaged_aside(folder, problem))
        else:
            _set_aside(folder, "abandoned")
    return lines


def set_damaged_aside(folder: Path, problem: CheckpointError) -> str:
    """Returns the line to tell."""
    return f"{problem}; it is {_set_aside(folder, 'damaged')} now"


def _set_aside(folder: Path, why: str) -> str:
    """Under a name that is no checkpoint's, which it returns."""
    aside = folder.with_name(f"{why}-{time.time_ns()}-{folder.name}")
    os.replace(folder, aside)
    return aside.name


class CheckpointReader:
    """Logical tensors from a checkpoint's chunks, whatever layout wrote them."""

    def __init__(self, folder: Path):
        """Checks all that the files say, and that they are as large as that. Raises: CheckpointError."""
        self.folder, self.meta = folder, read_meta(folder)
        indexes = read_indexes(folder, self.meta)
        self.config = checked_config(folder, self.meta, indexes)  # of the run that wrote it
        self._files = ChunkFiles(folder)
        self.read = self._files.read
        self._chunks = checked_chunks(folder, self.meta, self.config, indexes)
        self.tensors = logical_tensors(self.config.model, self.config.pattern)

    @property
    def bytes_read(self) -> int:
        """Of tensors, so far."""
        return self._files.bytes_read

    @property
    def has_checksums(self) -> bool:
        return self.meta.format > FIRST_FORMAT

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those of which every tensor is there."""
        return tuple(kind for kind in KINDS if all(f"{kind}:{name}" in self._chunks for name in self.tensors))

    def chunks(self, kind: str, logical: LogicalTensor) -> list[Chunk]:
        """Those that make the tensor. Raises: CheckpointError when it is missing or of another shape."""
        key = f"{kind}:{logical.name}"
        if key not in self._chunks:
            raise CheckpointError(
                f"checkpoint {self.folder}: no {key}; it is of another model or without optimiser state"
            )
        shape = self.tensors[logical.name].shape
        if shape != logical.shape:
            raise CheckpointError(
                f"checkpoint {self.folder}: {logical.name} has shape {list(shape)}, the model {list(logical.shape)}; "
                "use the checkpoint's model and depth keys"
            )
        return self._chunks[key]

    def all_chunks(self) -> list[Chunk]:
        """Of every tensor of every kind."""
        return [chunk for chunks in self._chunks.values() for chunk in chunks]

    def array(self, kind: str, logical: LogicalTensor) -> numpy.ndarray:
        """fp32, whole. Raises: CheckpointError when it is missing, damaged or of another shape."""
        whole = numpy.empty(logical.shape, dtype=numpy.float32)
        for chunk in self.chunks(kind, logical):
            whole[chunk.box.slices()] = self.read(chunk)
        return whole
