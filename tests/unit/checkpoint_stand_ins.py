"""Whole checkpoints of a small model, written without ranks: two files, each tensor in two parts that change places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lime_dist.checkpoint.boxes import Box
from lime_dist.checkpoint.checking import FIRST_FORMAT, FORMAT, meta_text
from lime_dist.checkpoint.chunk_files import chunk_key, write_chunks
from lime_dist.checkpoint.reader import CheckpointReader
from lime_dist.config import check_config, parse_config, to_dict
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import KINDS

MODEL = {
    "model": {"num_layers": 3, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "vocab_size": 16},
    "run": {"steps": 9},
}


def write_checkpoint(
    folder: Path, step: int = 7, tree: Mapping[str, Any] = MODEL, std: float = 1.0
) -> dict[str, np.ndarray]:
    """What `folder` then holds: KIND:NAME -> values."""
    folder.mkdir(parents=True)
    whole = _tensors(step, tree, std)
    files: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    for index, (key, values) in enumerate(whole.items()):
        for stem, start, part in _halves(index, values):
            corner = (*(0,) * (values.ndim - 1), start)
            files[stem][chunk_key(*key.split(":"), Box(corner, part.shape))] = part
    stems = {stem: write_chunks(folder, stem, tensors) for stem, tensors in files.items()}
    (folder / "meta.json").write_bytes(meta_text(_meta(FORMAT, step, tree, stems)))
    return whole


def write_first_format(folder: Path, step: int = 7, tree: Mapping[str, Any] = MODEL) -> dict[str, np.ndarray]:
    """The same as versions before checksums wrote it."""
    folder.mkdir(parents=True)
    whole = _tensors(step, tree)
    files: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    places: dict[str, dict[str, dict]] = {"a": {}, "b": {}}
    for index, (key, values) in enumerate(whole.items()):
        for stem, start, part in _halves(index, values):
            files[stem][f"{key}@{start}"] = part
            places[stem][f"{key}@{start}"] = {"dim": values.ndim - 1, "start": start, "shape": list(values.shape)}
    for stem in files:
        save_file(files[stem], folder / f"{stem}.safetensors")
        (folder / f"{stem}.json").write_text(json.dumps(places[stem]))
    (folder / "meta.json").write_text(json.dumps(_meta(FIRST_FORMAT, step, tree, list(files))))
    return whole


def _tensors(step: int, tree: Mapping[str, Any], std: float = 1.0) -> dict[str, np.ndarray]:
    config, generator = check_config(parse_config(tree)), np.random.default_rng(step)
    return {
        f"{kind}:{tensor.name}": generator.normal(0, std, size=tensor.shape).astype(np.float32)
        for kind in KINDS
        for tensor in logical_tensors(config.model, config.pattern).values()
    }


def _halves(index: int, values: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """File, start along the last dimension, and values."""
    cut = values.shape[-1] // 2
    for stem, start, end in zip("ab" if index % 2 else "ba", (0, cut), (cut, values.shape[-1]), strict=True):
        if start < end:
            yield stem, start, np.ascontiguousarray(values[..., start:end])


def _meta(number: int, step: int, tree: Mapping[str, Any], files: Any) -> dict[str, Any]:
    config = to_dict(check_config(parse_config(tree)))
    return {"format": number, "step": step, "samples_seen": 12 * step, "config": config, "files": files}


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    """What a reader gives of it. Raises: CheckpointError."""
    reader = CheckpointReader(folder)
    tensors = logical_tensors(reader.config.model, reader.config.pattern).values()
    return {f"{kind}:{tensor.name}": reader.array(kind, tensor) for kind in KINDS for tensor in tensors}


def sign(folder: Path) -> None:
    """The checksums of indexes and meta.json made anew, as whoever crafts a checkpoint can."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"]
    meta["files"] = {stem: hashlib.sha256((folder / f"{stem}.json").read_bytes()).hexdigest() for stem in meta["files"]}
    (folder / "meta.json").write_bytes(meta_text(meta))
