"""Logical tensors of a checkpoint for a model, which may read fewer entries than the one that was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lime_dist.checkpoint.files import CheckpointReader
from lime_dist.depth.pattern import Pattern
from lime_dist.errors import CheckpointError
from lime_dist.lime.parameters import LogicalTensor, Role
from lime_dist.resolve import saved_config


class SavedWeights:
    """Values for a model of `pattern`: where the saved pattern reads more, the routers' cut edges are left out."""

    def __init__(self, folder: Path, pattern: Pattern):
        """Raises: CheckpointError."""
        self._reader = CheckpointReader(folder)
        self.meta, self._pattern = self._reader.meta, pattern
        self._saved_pattern = saved_config(self._reader).pattern

    def tensor(self, kind: str, logical: LogicalTensor) -> Tensor:
        """fp32 on the CPU, whole. Raises: CheckpointError when missing, or when the model reads an edge that was not saved."""
        if logical.role is not Role.ROUTER or self._saved_pattern.num_layers != self._pattern.num_layers:
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
