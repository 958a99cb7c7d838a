"""Safetensors of a folder that comes from anybody: what they hold is known, and checked, before any of it is read.

Names stay within the folder, only regular files are opened, and no pickle ever is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open

from lime_dist.checkpoint.safe_files import brief, file_size, read_json
from lime_dist.errors import CheckpointError, shown
from lime_dist.hugging_face.names import Stored

_SINGLE = ("model.safetensors", "weights.safetensors")  # the latter: of reference numbers
_INDEX = "model.safetensors.index.json"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class _Header:
    path: Path
    shape: tuple[int, ...]
    dtype: str


class PublishedWeights:
    """The tensors of a folder by name."""

    def __init__(self, folder: Path):
        """Reads the headers. Raises: CheckpointError."""
        self.folder = folder
        self._headers = dict(_headers(folder))

    @property
    def names(self) -> set[str]:
        return set(self._headers)

    def check(self, stored: Stored) -> None:
        """Raises: CheckpointError where it is missing, of another shape or of a type that is not read."""
        header = self._headers.get(stored.name)
        if header is None:
            raise CheckpointError(
                f"{self.folder}: no tensor {stored.name}; give a folder of the model in its config.json"
            )
        if header.shape != stored.shape:
            raise CheckpointError(
                f"{self.folder}: {stored.name} has shape {shown(list(header.shape))}, its config.json says "
                f"{list(stored.shape)}; correct config.json or give another folder"
            )
        if header.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.folder}: {stored.name} is {header.dtype}; only {', '.join(_DTYPES)} are read, so convert it"
            )

    def read(self, stored: Stored) -> numpy.ndarray:
        """fp32, as a logical tensor lies. Raises: CheckpointError where it is damaged or not finite."""
        header = self._headers[stored.name]
        try:
            with safe_open(header.path, framework="pt") as file:
                values = file.get_tensor(stored.name).to(torch.float32)
        except (OSError, SafetensorError) as error:
            raise _unreadable(header.path, error) from None
        if tuple(values.shape) != stored.shape:  # written to in the meantime
            raise CheckpointError(f"{self.folder}: {stored.name} has changed while it was read; try again")
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self.folder}: {stored.name} is not finite; give another folder")
        return numpy.ascontiguousarray(stored.take(values.numpy()))


def _headers(folder: Path) -> Iterator[tuple[str, _Header]]:
    if os.path.lexists(folder / _INDEX):
        yield from _indexed(folder)
        return
    path = next((folder / name for name in _SINGLE if os.path.lexists(folder / name)), None)
    if path is None:
        raise _no_weights(folder)
    yield from _headers_of(path).items()


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES) if folder.is_dir() else []
    if pickles:
        return CheckpointError(
            f"{folder}: only pickled weights ({shown(pickles[0])}), which run commands when they are read; convert them to safetensors"
        )
    return CheckpointError(f"{folder}: no {_SINGLE[0]} and no {_INDEX} in it; give a folder of safetensors")


def _indexed(folder: Path) -> Iterator[tuple[str, _Header]]:
    index: Any = read_json(folder / _INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / _INDEX}: no weight_map; give another folder")
    files: dict[str, dict[str, _Header]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{folder / _INDEX}: {shown(file)} is no file of this folder; give another folder")
        if file not in files:
            files[file] = _headers_of(folder / file)
        if name not in files[file]:
            raise CheckpointError(f"{folder / _INDEX}: {shown(name)} is not in {file}; give a whole folder")
        yield name, files[file][name]


def _headers_of(path: Path) -> dict[str, _Header]:
    file_size(path)  # raises for links and what else is no regular file
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: _Header(path, tuple(view.get_shape()), view.get_dtype()) for name, view in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: {brief(error)}; give a whole file")
