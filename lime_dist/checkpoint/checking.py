"""What a checkpoint's files may say. They may come from anybody, so nothing is taken on trust: names stay within the
folder, only regular files of bounded size are opened, and every number is held against the saved config before
anything of its size is made. The tensors themselves are verified as they are read. Needs no ranks and no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy

from lime_dist.checkpoint.boxes import Box
from lime_dist.checkpoint.chunk_files import Chunk, index_path, tensor_path
from lime_dist.checkpoint.safe_files import brief, file_size, parse_json, read_bytes, read_json, refuse
from lime_dist.config import Config, check_config, parse_config
from lime_dist.config.ranges import RANGES
from lime_dist.errors import CheckpointError, ConfigError
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import KINDS, LogicalTensor
from lime_dist.training.spikes import SpikeState

FORMAT = 2
FIRST_FORMAT = 1  # slices along one dimension, without checksums
STEP_NAME = re.compile(r"step_([0-9]+)")
_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY = re.compile(r"(([a-z_]+):(\S+))@([0-9]{1,18}(?:,[0-9]{1,18}){0,7})")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_COUNT = 2**53  # of steps and samples
_MAX_WINDOW = int(RANGES["spikes.window"].high)
_MAX_NUMBER = 1e100  # above what fp32 numbers can give, and below what overflows when squared
_ELEMENT_BYTES = 4  # fp32


@dataclass(frozen=True)
class Origin:
    """What a checkpoint came from beside its config, as far as is known.

    versions: by package. tokenizer: SHA-256 of the file that made the training text.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str | None = None


@dataclass(frozen=True)
class Meta:
    """What the checkpoint says of itself. Older ones say nothing of the last two."""

    format: int
    step: int  # steps done
    samples_seen: int  # the next sample to read
    config: dict[str, Any]
    files: dict[str, str | None]  # stem -> checksum of its index
    spikes: SpikeState = SpikeState()
    origin: Origin = Origin()

    @property
    def num_updates(self) -> int:
        """Those that the weights and moments come from."""
        return self.step - self.spikes.num_skipped


Indexes = Mapping[str, Mapping[str, Any]]  # stem -> key -> what the index says of it


# ---- meta.json


def meta_text(values: Mapping[str, Any]) -> bytes:
    """meta.json of these values, with the checksum of all of them."""
    return json.dumps({**values, "sha256": _meta_digest(values)}).encode()


def _meta_digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_meta(folder: Path) -> Meta:
    """Raises: CheckpointError when the folder is no checkpoint, of another format or not what this program writes."""
    path = folder / "meta.json"
    if not os.path.lexists(path):
        raise CheckpointError(
            f"checkpoint {folder}: no meta.json in it; name a folder such as RUN/checkpoints/step_000100"
        )
    values = read_json(path)
    found = values.get("format") if isinstance(values, dict) else None
    if not is_count(found) or found not in (FIRST_FORMAT, FORMAT):
        raise CheckpointError(
            f"checkpoint {folder}: format {_short(found)}, this version reads {FIRST_FORMAT} and {FORMAT}; use that version"
        )
    if found == FORMAT and values.pop("sha256", None) != _meta_digest(values):
        refuse(path, "is damaged: its checksum is another")
    for name, holds in _META_VALUES.items():
        if name not in values:
            refuse(folder, f"no {name} in meta.json")
        if not holds(values[name]):
            refuse(folder, f"{name} in meta.json cannot be {_short(values[name])}")
    if (named := STEP_NAME.fullmatch(folder.name)) and int(named[1]) != values["step"]:
        refuse(folder, f"step {values['step']} in meta.json")
    if found == FIRST_FORMAT:
        values["files"] = dict.fromkeys(values["files"])
    known = {name: values[name] for name in _META_VALUES}
    spikes = _read_spikes(folder, values.get("spikes", {}), values["step"], values["samples_seen"])
    return Meta(format=found, **known, spikes=spikes, origin=_read_origin(folder, values.get("origin", {})))


def _read_origin(folder: Path, values: Any) -> Origin:
    if not isinstance(values, dict) or not values.keys() <= _ORIGIN_VALUES.keys():
        refuse(folder, f"origin in meta.json cannot be {_short(values)}")
    for name, value in values.items():
        if not _ORIGIN_VALUES[name](value):
            refuse(folder, f"origin.{name} in meta.json cannot be {_short(value)}")
    return Origin(**values)


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


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(map(is_count, value))


def _are_files(value: Any) -> bool:
    """Stems with the checksums of their indexes; in the first format stems alone."""
    if isinstance(value, dict) and not all(
        isinstance(found, str) and _SHA256.fullmatch(found) for found in value.values()
    ):
        return False
    return (
        isinstance(value, (dict, list))
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
_ORIGIN_VALUES: dict[str, Callable[[Any], bool]] = {
    "versions": lambda value: isinstance(value, dict) and all(isinstance(text, str) for text in value.values()),
    "tokenizer": lambda value: value is None or (isinstance(value, str) and bool(_SHA256.fullmatch(value))),
}
_META_VALUES = {
    "step": is_count,
    "samples_seen": is_count,
    "config": lambda value: isinstance(value, dict),
    "files": _are_files,
}


def _short(value: Any) -> str:
    return reprlib.repr(value)


# ---- indexes against the config


def read_indexes(folder: Path, meta: Meta) -> Indexes:
    """Raises: CheckpointError."""
    return {stem: _read_index(index_path(folder, stem), sha256) for stem, sha256 in meta.files.items()}


def _read_index(path: Path, sha256: str | None) -> Mapping[str, Any]:
    content = read_bytes(path)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        refuse(path, "is damaged: its checksum is another")
    index = parse_json(path, content)
    if not isinstance(index, dict):
        refuse(path, "no mapping of tensors")
    return index


def checked_config(folder: Path, meta: Meta, indexes: Indexes) -> Config:
    """The saved config. Raises: CheckpointError when it cannot be, or has more layers than the files have norms."""
    names = {key.partition("@")[0] for keys in indexes.values() for key in keys}
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


def checked_chunks(folder: Path, meta: Meta, config: Config, indexes: Indexes) -> dict[str, list[Chunk]]:
    """For each KIND:NAME the chunks that make it, without gap or overlap.

    Raises: CheckpointError, also when a tensor of the model has no weight, or files are smaller than their tensors.
    """
    tensors = logical_tensors(config.model, config.pattern)
    chunks: dict[str, list[Chunk]] = {}
    for stem, index in indexes.items():
        for key, entry in index.items():
            found = _KEY.fullmatch(key)
            if found is None or found[2] not in KINDS or found[3] not in tensors:
                refuse(index_path(folder, stem), f"{_short(key)} is no tensor of the model in its config")
            corner = tuple(map(int, found[4].split(",")))
            place = _first_format_place if meta.format == FIRST_FORMAT else _place
            chunk = place(folder, Chunk(stem, key, Box(corner, ()), None), entry, tensors[found[3]])
            chunks.setdefault(found[1], []).append(chunk)
    if meta.format == FIRST_FORMAT:
        chunks = {key: _cut_apart(folder, key, parts) for key, parts in chunks.items()}
    for key, parts in chunks.items():
        _check_cover(folder, key, parts, tensors[key.partition(":")[2]])
    for name in tensors:
        if f"weight:{name}" not in chunks:
            refuse(folder, f"no weight:{name}")
    _check_sizes(folder, indexes, (chunk for parts in chunks.values() for chunk in parts))
    return chunks


def _place(folder: Path, chunk: Chunk, entry: Any, tensor: LogicalTensor) -> Chunk:
    """The chunk with what its entry says."""
    values = entry if isinstance(entry, dict) else {}
    sizes, sha256, corner = values.get("sizes"), values.get("sha256"), chunk.box.offsets
    fits = (
        _are_counts(sizes)
        and len(sizes) == len(corner) == len(tensor.shape)
        and all(size and start + size <= whole for start, size, whole in zip(corner, sizes, tensor.shape, strict=True))
    )
    if not fits or not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        refuse(index_path(folder, chunk.stem), f"{chunk.key} cannot be {_short(entry)}")
    return Chunk(chunk.stem, chunk.key, Box(corner, tuple(values["sizes"])), sha256)


def _check_cover(folder: Path, key: str, chunks: Sequence[Chunk], tensor: LogicalTensor) -> None:
    """As many elements as the tensor has, and none twice, are all of them."""
    starts = numpy.array([chunk.box.offsets for chunk in chunks])
    ends = starts + numpy.array([chunk.box.sizes for chunk in chunks])
    overlap = any(
        ((starts[index] < ends[index + 1 :]) & (starts[index + 1 :] < ends[index])).all(axis=1).any()
        for index in range(len(chunks) - 1)
    )
    if overlap or sum(chunk.box.num_elements for chunk in chunks) != prod(tensor.shape):
        refuse(folder, f"{key} is incomplete, or its chunks overlap")


def _check_sizes(folder: Path, indexes: Indexes, chunks: Iterable[Chunk]) -> None:
    needed = dict.fromkeys(indexes, 0)
    for chunk in chunks:
        needed[chunk.stem] += _ELEMENT_BYTES * chunk.box.num_elements
    for stem, size in needed.items():
        path = tensor_path(folder, stem)
        if file_size(path) < size:
            refuse(path, f"cut short, or a chunk is missing: its tensors have {size} bytes")


# ---- the first format: KIND:NAME@START with the dimension, its start and the whole shape; a slice ends where the next begins


def _first_format_place(folder: Path, chunk: Chunk, entry: Any, tensor: LogicalTensor) -> Chunk:
    """The slice up to the tensor's end."""
    values = entry if isinstance(entry, dict) else {}
    shape, dim, said, (start, *more) = values.get("shape"), values.get("dim"), values.get("start"), chunk.box.offsets
    path = index_path(folder, chunk.stem)
    if not _are_counts(shape) or tuple(shape) != tensor.shape:
        refuse(path, f"{chunk.key} has shape {_short(shape)}, its config says {list(tensor.shape)}")
    if more or not is_count(dim) or dim >= len(shape) or not is_count(said) or said != start or start >= shape[dim]:
        refuse(path, f"{chunk.key} cannot be at {_short(entry)}")
    before, behind = (0,) * dim, (0,) * (len(shape) - dim - 1)
    sizes = (*shape[:dim], shape[dim] - start, *shape[dim + 1 :])
    return Chunk(chunk.stem, chunk.key, Box((*before, start, *behind), sizes), None)


def _cut_apart(folder: Path, key: str, chunks: Sequence[Chunk]) -> list[Chunk]:
    """Slices that end where the next one begins."""
    chunks = sorted(chunks, key=lambda chunk: chunk.box.offsets)
    moved = {dim for chunk in chunks for dim, start in enumerate(chunk.box.offsets) if start}
    if len(moved) > 1 or len({chunk.box.offsets for chunk in chunks}) < len(chunks):
        refuse(folder, f"{key} is incomplete, or its chunks overlap")
    dim = next(iter(moved), 0)
    cut = []
    for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
        sizes = list(chunk.box.sizes)
        if following is not None:
            sizes[dim] = following.box.offsets[dim] - chunk.box.offsets[dim]
        cut.append(Chunk(chunk.stem, chunk.key, Box(chunk.box.offsets, tuple(sizes)), None))
    return cut
