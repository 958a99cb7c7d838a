"""Logical tensors of a checkpoint for a model, which may read fewer entries than the one that was saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lime_dist.checkpoint.edges import check_same_model, saved_config
from lime_dist.checkpoint.reader import CheckpointReader
from lime_dist.config import Config
from lime_dist.errors import CheckpointError
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import LogicalTensor, Role


class SavedWeights:
    """Values for a model of `pattern`: where the saved pattern reads more, the routers' cut edges are left out."""

    def __init__(self, folder: Path, config: Config):
        """Raises: CheckpointError when it is no whole checkpoint or of another model."""
        self._reader = CheckpointReader(folder)
        saved = saved_config(self._reader)
        check_same_model(folder, saved, config)
        self.meta, self._pattern, self._saved_pattern = self._reader.meta, config.pattern, saved.pattern
        self._saved = logical_tensors(saved.model, saved.pattern)

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
        whole = self._reader.array(kind, self._saved[logical.name])
        places = [saved.index(source) for source in wanted]
        return torch.from_numpy(self._pattern.routing.without_sources(whole, len(saved), places))
