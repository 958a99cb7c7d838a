"""What a checkpoint's files may say. They may come from anybody, so nothing is taken on trust: names stay within the
folder, only regular files of bounded size are opened, and every number is held against the saved config before
anything of its size is made. What the values of the tensors are is not known here. Needs no ranks and no torch.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from lime_dist.config import Config, check_config, parse_config
from lime_dist.config.ranges import RANGES
from lime_dist.errors import CheckpointError, ConfigError, one_line
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import LogicalTensor
from lime_dist.training.spikes import SpikeState

FORMAT = 1
STEP_NAME = re.compile(r"step_([0-9]+)")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY = re.compile(r"([a-z_]+:(\S+))@([0-9]{1,18})")
_MAX_JSON_BYTES = 64 * 2**20
_MAX_COUNT = 2**53  # of steps and samples
_MAX_WINDOW = int(RANGES["spikes.window"].high)
_MAX_NUMBER = 1e100  # above what fp32 numbers can give, and below what overflows when squared
_MAX_MESSAGE = 300  # characters of what others say is wrong
_ELEMENT_BYTES = 4  # fp32


@dataclass(frozen=True)
class Meta:
    """What the checkpoint says of itself."""

    step: int  # steps done
    samples_seen: int  # the next sample to read
    config: dict[str, Any]
    files: list[str]  # stems
    spikes: SpikeState = SpikeState()  # older ones say nothing of it

    @property
    def num_updates(self) -> int:
        """Those that the weights and moments come from."""
        return self.step - self.spikes.num_skipped


@dataclass(frozen=True)
class Slice:
    """The tensor `key` of the file `stem`: `shape`, at `start` along `dim` of a logical tensor."""

    stem: str
    key: str
    dim: int
    start: int
    shape: tuple[int, ...]


Places = Mapping[str, Mapping[str, Any]]  # stem -> key -> what the file says of it


def refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"checkpoint {path}: {problem}; name another checkpoint")


def brief(error: BaseException) -> str:
    """The error's text on one line, cut where a value in it is long."""
    return one_line(error)[:_MAX_MESSAGE]


# ---- files


def file_size(path: Path) -> int:
    """Bytes of a regular file. Raises: CheckpointError for anything else, which might block, or lead out of the folder."""
    try:
        status = path.lstat()
    except OSError as error:
        refuse(path, error.strerror or "cannot be read")
    if not stat.S_ISREG(status.st_mode):
        refuse(path, "no regular file")
    return status.st_size


def read_json(path: Path) -> Any:
    """Raises: CheckpointError."""
    if file_size(path) > _MAX_JSON_BYTES:
        refuse(path, f"larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        refuse(path, getattr(error, "strerror", None) or "cut short or not JSON")


# ---- meta.json


def read_meta(folder: Path) -> Meta:
    """Raises: CheckpointError when the folder is no checkpoint, of another format or not what this program writes."""
    path = folder / "meta.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"checkpoint {folder}: no meta.json in it; name a folder such as RUN/checkpoints/step_000100"
        )
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if not is_count(found) or found != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder}: format {_short(found)}, this version reads {FORMAT}; use that version"
        )
    for name, holds in _META_VALUES.items():
        if name not in values:
            refuse(folder, f"no {name} in meta.json")
        if not holds(values[name]):
            refuse(folder, f"{name} in meta.json cannot be {_short(values[name])}")
    if (named := STEP_NAME.fullmatch(folder.name)) and int(named[1]) != values["step"]:
        refuse(folder, f"step {values['step']} in meta.json")
    known = {name: values[name] for name in _META_VALUES}
    return Meta(**known, spikes=_read_spikes(folder, values.get("spikes", {}), values["step"], values["samples_seen"]))


def _read_spikes(folder: Path, values: Any, step: int, samples_seen: int) -> SpikeState:
    """What is not there has its default."""
    names = {item.name for item in fields(SpikeState)}
    if not isinstance(values, dict) or not values.keys() <= names:
        refuse(folder, f"spikes in meta.json cannot be {_short(values)}")
    for name, value in values.items():
        if not _SPIKE_VALUES[name](value):
            refuse(folder, f"spikes.{name} in meta.json cannot be {_short(value)}")
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    state = SpikeState(**given)
    latest = max(state.bad_steps, default=0)
    if max(latest, state.num_skipped) > step or state.samples_passed_over > samples_seen:
        refuse(folder, f"spikes in meta.json cannot be {_short(values)} at step {step}")
    return state


def is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _are_stems(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(stem, str) and _STEM.fullmatch(stem) for stem in value)
        and len(set(value)) == len(value)
    )


def _are_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_WINDOW
        and all(type(item) is float and abs(item) < _MAX_NUMBER for item in value)
    )


def _are_steps(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MAX_WINDOW
        and all(is_count(item) for item in value)
        and all(first < second for first, second in pairwise([0, *value]))
    )


_SPIKE_VALUES: dict[str, Callable[[Any], bool]] = {
    "losses": _are_numbers,
    "grad_norms": _are_numbers,
    "bad_steps": _are_steps,
    "num_skipped": is_count,
    "num_returns": is_count,
    "samples_passed_over": is_count,
}
_META_VALUES = {
    "step": is_count,
    "samples_seen": is_count,
    "config": lambda value: isinstance(value, dict),
    "files": _are_stems,
}


def _short(value: Any) -> str:
    return reprlib.repr(value)


# ---- slices against the config


def checked_config(folder: Path, meta: Meta, places: Places) -> Config:
    """The saved config. Raises: CheckpointError when it cannot be, or has more layers than the files have norms."""
    names = {key.partition("@")[0] for keys in places.values() for key in keys}
    norms = sum(name.startswith("weight:") and ".input_layernorm." in name for name in names)
    try:
        config = parse_config(_with_present_names(meta.config))
        if config.model.num_layers > norms:  # before anything is made for each layer
            refuse(folder, f"{norms} layers in its files, model.num_layers={config.model.num_layers} in its config")
        config = check_config(config)
        _ = config.pattern
    except ConfigError as error:
        refuse(folder, f"config in meta.json: {brief(error)}")
    return config


_RENAMED = {("optim", "min_lr_ratio"): "min_lr"}  # keys of earlier versions


def _with_present_names(config: dict[str, Any]) -> dict[str, Any]:
    """The config of an earlier version, of which the weights are as good."""
    config = {key: dict(keys) if isinstance(keys, dict) else keys for key, keys in config.items()}
    for (section, old), new in _RENAMED.items():
        keys = config.get(section)
        if isinstance(keys, dict) and old in keys:
            keys[new] = keys.pop(old)
    return config


def checked_slices(folder: Path, config: Config, places: Places) -> dict[str, list[Slice]]:
    """For each KIND:NAME the slices that make it, in order, without gap or overlap.

    Raises: CheckpointError, also when a tensor of the model has no weight, or files are smaller than their tensors.
    """
    tensors = logical_tensors(config.model, config.pattern)
    starts: dict[str, list[Slice]] = {}
    for stem, keys in places.items():
        for key, place in keys.items():
            found = _KEY.fullmatch(key)
            if found is None or found[2] not in tensors:
                refuse(folder / f"{stem}.json", f"{_short(key)} is no tensor of the model in its config")
            part = _placed(folder, stem, key, place, tensors[found[2]], int(found[3]))
            starts.setdefault(found[1], []).append(part)
    slices = {key: _cut(folder, key, parts) for key, parts in starts.items()}
    for name in tensors:
        if f"weight:{name}" not in slices:
            refuse(folder, f"no weight:{name}")
    _check_sizes(folder, places, (part for parts in slices.values() for part in parts))
    return slices


def _placed(folder: Path, stem: str, key: str, place: Any, tensor: LogicalTensor, start: int) -> Slice:
    """The slice with the whole tensor's shape: where it ends shows from the one behind it."""
    values = place if isinstance(place, dict) else {}
    shape, dim, said = values.get("shape"), values.get("dim"), values.get("start")
    if not isinstance(shape, list) or not all(map(is_count, shape)) or tuple(shape) != tensor.shape:
        refuse(folder / f"{stem}.json", f"{key} has shape {_short(shape)}, its config says {list(tensor.shape)}")
    if not is_count(dim) or dim >= len(shape) or not is_count(said) or said != start or start >= shape[dim]:
        refuse(folder / f"{stem}.json", f"{key} cannot be at {_short(place)}")
    return Slice(stem, key, dim, start, tensor.shape)


def _cut(folder: Path, key: str, parts: Sequence[Slice]) -> list[Slice]:
    parts = sorted(parts, key=lambda part: part.start)
    dim, whole = parts[0].dim, parts[0].shape
    starts = [part.start for part in parts]
    if starts[0] != 0 or len(set(starts)) < len(starts) or any(part.dim != dim for part in parts):
        refuse(folder, f"{key} is incomplete, or its slices overlap")
    ends = [*starts[1:], whole[dim]]
    return [
        Slice(part.stem, part.key, dim, part.start, (*whole[:dim], end - part.start, *whole[dim + 1 :]))
        for part, end in zip(parts, ends, strict=True)
    ]


def _check_sizes(folder: Path, places: Places, parts: Iterable[Slice]) -> None:
    needed = dict.fromkeys(places, 0)
    for part in parts:
        needed[part.stem] += _ELEMENT_BYTES * prod(part.shape)
    for stem, size in needed.items():
        path = folder / f"{stem}.safetensors"
        if file_size(path) < size:
            refuse(path, f"cut short, or a slice is missing: its tensors have {size} bytes")
