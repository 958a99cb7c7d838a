"""A whole checkpoint of a small model, written without ranks: two files, each tensor in two slices that change places."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lime_dist.checkpoint.checking import FORMAT
from lime_dist.checkpoint.reader import CheckpointReader
from lime_dist.config import check_config, parse_config, to_dict
from lime_dist.plan.parameters import logical_tensors

KINDS = ("weight", "exp_avg", "exp_avg_sq")
MODEL = {
    "model": {"num_layers": 3, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "vocab_size": 16},
    "run": {"steps": 9},
}


def write_checkpoint(
    folder: Path, step: int = 7, tree: Mapping[str, Any] = MODEL, std: float = 1.0
) -> dict[str, np.ndarray]:
    """What `folder` then holds: KIND:NAME -> values."""
    folder.mkdir(parents=True)
    config = check_config(parse_config(tree))
    generator = np.random.default_rng(step)
    whole: dict[str, np.ndarray] = {}
    files: dict[str, dict[str, np.ndarray]] = {"a": {}, "b": {}}
    places: dict[str, dict[str, dict]] = {"a": {}, "b": {}}
    for kind in KINDS:
        for tensor in logical_tensors(config.model, config.pattern).values():
            values = whole[f"{kind}:{tensor.name}"] = generator.normal(0, std, size=tensor.shape).astype(np.float32)
            dim = len(tensor.shape) - 1
            cut = tensor.shape[dim] // 2
            order = "ab" if len(whole) % 2 else "ba"
            for stem, start, end in ((order[0], 0, cut), (order[1], cut, tensor.shape[dim])):
                if start == end:
                    continue
                key = f"{kind}:{tensor.name}@{start}"
                files[stem][key] = np.ascontiguousarray(values[..., start:end])
                places[stem][key] = {"dim": dim, "start": start, "shape": list(tensor.shape)}
    for stem in files:
        save_file(files[stem], folder / f"{stem}.safetensors")
        (folder / f"{stem}.json").write_text(json.dumps(places[stem]))
    meta = {"format": FORMAT, "step": step, "samples_seen": 12 * step, "config": to_dict(config), "files": ["a", "b"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return whole


def all_tensors(folder: Path) -> dict[str, np.ndarray]:
    """What a reader gives of it. Raises: CheckpointError."""
    reader = CheckpointReader(folder)
    tensors = logical_tensors(reader.config.model, reader.config.pattern).values()
    return {f"{kind}:{tensor.name}": reader.array(kind, tensor) for kind in KINDS for tensor in tensors}
