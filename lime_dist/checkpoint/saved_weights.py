"""Logical tensors of a checkpoint for a model, which may read fewer entries than the one that was saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from lime_dist.checkpoint.edges import check_same_model, saved_config
from lime_dist.checkpoint.reader import CheckpointReader
from lime_dist.config import Config
from lime_dist.errors import CheckpointError
from lime_dist.plan.parameters import ROUTER_ROLES, LogicalTensor, Role


class SavedWeights:
    """Values for a model of `pattern`: where the saved pattern reads more, the routers' cut edges are left out."""

    def __init__(self, folder: Path, config: Config):
        """Raises: CheckpointError when it is no whole checkpoint or of another model."""
        self._reader = CheckpointReader(folder)
        saved = saved_config(self._reader)
        check_same_model(folder, saved, config)
        self.meta, self._pattern, self._saved_pattern = self._reader.meta, config.pattern, saved.pattern

    def tensor(self, kind: str, logical: LogicalTensor) -> Tensor:
        """fp32 on the CPU, whole. Raises: CheckpointError when missing, or when the model reads an edge that was not saved."""
        if logical.role not in ROUTER_ROLES:
            return torch.from_numpy(self._reader.array(kind, logical))
        reader = int(logical.name.split(".")[1])
        saved, wanted = self._saved_pattern.sources[reader], self._pattern.sources[reader]
        missing = set(wanted) - set(saved)
        if missing:
            raise CheckpointError(
                f"checkpoint {self._reader.folder}: layer {reader} of the model reads layer {min(missing)}, the saved one does not; "
                "use its depth.pattern or one with fewer edges"
            )
        whole = self._reader.array(kind, replace(logical, shape=_resized(logical.shape, logical.role, wanted, saved)))
        return torch.from_numpy(resize_router(whole, logical.role, saved, wanted))


def resize_router(whole: numpy.ndarray, role: Role, saved: tuple[int, ...], wanted: tuple[int, ...]) -> numpy.ndarray:
    """A router over the sources `saved` without those that are not `wanted`."""
    by_source = whole.reshape(-1, len(saved), whole.shape[-1]) if role is Role.DYNAMIC_ROUTER else whole
    kept = by_source[:, [saved.index(source) for source in wanted]]
    return kept.reshape(_resized(whole.shape, role, saved, wanted))


def _resized(shape: tuple[int, ...], role: Role, sources: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a router over `sources`, had it `others`: [H_kv, sources, ...], dynamic [H_kv * sources, hidden]."""
    if role is Role.DYNAMIC_ROUTER:
        return shape[0] // len(sources) * len(others), shape[1]
    return shape[0], len(others), *shape[2:]
