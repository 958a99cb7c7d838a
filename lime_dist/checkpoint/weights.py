"""Logical tensors of a checkpoint for a model, which may read fewer entries than the one that was saved."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from lime_dist.checkpoint.files import CheckpointReader
from lime_dist.config import Config
from lime_dist.errors import CheckpointError
from lime_dist.lime.parameters import LogicalTensor, Role
from lime_dist.resolve import saved_config


class SavedWeights:
    """Values for a model of `pattern`: where the saved pattern reads more, the routers' cut edges are left out."""

    def __init__(self, folder: Path, config: Config):
        """Raises: CheckpointError when it is no whole checkpoint or of another model."""
        self._reader = CheckpointReader(folder)
        saved = saved_config(self._reader)
        _check_same_model(folder, saved, config)
        self.meta, self._pattern, self._saved_pattern = self._reader.meta, config.pattern, saved.pattern

    def tensor(self, kind: str, logical: LogicalTensor) -> Tensor:
        """fp32 on the CPU, whole. Raises: CheckpointError when missing, or when the model reads an edge that was not saved."""
        if logical.role is not Role.ROUTER:
            return torch.from_numpy(self._reader.array(kind, logical))
        reader = int(logical.name.split(".")[1])
        saved, wanted = self._saved_pattern.sources[reader], self._pattern.sources[reader]
        missing = set(wanted) - set(saved)
        if missing:
            raise CheckpointError(
                f"checkpoint {self._reader.folder}: layer {reader} of the model reads layer {min(missing)}, the saved one does not; "
                "use its depth.pattern or one with fewer edges"
            )
        num_heads = logical.shape[0]
        whole = self._reader.array(kind, replace(logical, shape=(num_heads, len(saved), num_heads)))
        return torch.from_numpy(whole[:, [saved.index(source) for source in wanted]])


def _check_same_model(folder: Path, saved: Config, config: Config) -> None:
    facts = {
        f"model.{item.name}": (getattr(saved.model, item.name), getattr(config.model, item.name))
        for item in fields(config.model)
    }
    facts["model.num_kv_heads"] = saved.model.kv_heads, config.model.kv_heads
    facts |= {f"depth.{key}": (getattr(saved.depth, key), getattr(config.depth, key)) for key in ("router", "entry")}
    for key, (theirs, ours) in facts.items():
        if theirs != ours:
            raise CheckpointError(
                f"checkpoint {folder}: saved with {key}={theirs}, the run has {ours}; set {key}={theirs} or another run.dir"
            )
