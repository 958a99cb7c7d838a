"""The files of a checkpoint, and reading logical tensors out of them. Needs no ranks and no torch.

    step_000100/
      meta.json             step, samples read, the resolved config, the files; written last
      pp00-tp00.safetensors fp32 slices that this rank owns, keyed KIND:NAME@START
      pp00-tp00.json        for each key: dim, start and the whole shape

KIND is weight, exp_avg or exp_avg_sq; NAME a logical tensor's. A slice lies in one file only.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open

from lime_dist.errors import CheckpointError, one_line
from lime_dist.lime.parameters import LogicalTensor

FORMAT = 1
_STEP_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Meta:
    """What the checkpoint says of itself."""

    step: int  # updates done
    samples_seen: int  # the next sample to read
    config: dict[str, Any]
    files: list[str]  # stems


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def find_checkpoints(checkpoints: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [
        path for path in checkpoints.iterdir() if _STEP_NAME.fullmatch(path.name) and (path / "meta.json").is_file()
    ]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The updates done before this checkpoint, by its name."""
    return int(folder.name.removeprefix("step_"))


def find_latest(checkpoints: Path) -> Path | None:
    found = find_checkpoints(checkpoints)
    return found[-1] if found else None


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "cut short or not JSON"
        raise CheckpointError(f"checkpoint {path}: {reason}; name another checkpoint") from None


def read_meta(folder: Path) -> Meta:
    """Raises: CheckpointError when the folder is no checkpoint or of another format."""
    if not (folder / "meta.json").is_file():
        raise CheckpointError(
            f"checkpoint {folder}: no meta.json in it; name a folder such as RUN/checkpoints/step_000100"
        )
    values = _read_json(folder / "meta.json")
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {folder}: format {found}, this version reads {FORMAT}; use that version")
    try:
        return Meta(values["step"], values["samples_seen"], values["config"], values["files"])
    except KeyError as error:
        raise CheckpointError(
            f"checkpoint {folder}: no {error.args[0]} in meta.json; name another checkpoint"
        ) from None


class CheckpointReader:
    """Logical tensors from a checkpoint's slices, whatever layout wrote them."""

    def __init__(self, folder: Path):
        """Raises: CheckpointError."""
        self.folder, self.meta = folder, read_meta(folder)
        self._slices: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
        for stem in self.meta.files:
            for key, place in _read_json(folder / f"{stem}.json").items():
                self._slices.setdefault(key.partition("@")[0], []).append((stem, key, place))

    def array(self, kind: str, logical: LogicalTensor) -> numpy.ndarray:
        """fp32, whole. Raises: CheckpointError when slices are missing or of another shape."""
        key = f"{kind}:{logical.name}"
        if key not in self._slices:
            raise CheckpointError(
                f"checkpoint {self.folder}: no {key}; it is of another model or without optimiser state"
            )
        whole = numpy.empty(logical.shape, dtype=numpy.float32)
        covered = 0
        for stem, slice_key, place in self._slices[key]:
            if tuple(place["shape"]) != logical.shape:
                raise CheckpointError(
                    f"checkpoint {self.folder}: {logical.name} has shape {place['shape']}, the model {list(logical.shape)}; "
                    "use the checkpoint's model and depth keys"
                )
            part = self._read(stem, slice_key)
            start, dim = place["start"], place["dim"]
            whole[(slice(None),) * dim + (slice(start, start + part.shape[dim]),)] = part
            covered += part.size
        if covered != whole.size:
            raise CheckpointError(f"checkpoint {self.folder}: {key} is incomplete; name another checkpoint")
        return whole

    def _read(self, stem: str, key: str) -> numpy.ndarray:
        path = self.folder / f"{stem}.safetensors"
        try:
            with safe_open(path, framework="np") as file:
                return file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"checkpoint {path}: {one_line(error)}; name another checkpoint") from None
