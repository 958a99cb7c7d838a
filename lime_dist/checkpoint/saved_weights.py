"""Logical tensors of a checkpoint for a model, which may read fewer entries than the one that was saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lime_dist.checkpoint.boxes import Part, common
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

    @property
    def bytes_read(self) -> int:
        """Of tensors, so far."""
        return self._reader.bytes_read

    def read(self, kind: str, wanted: Sequence[tuple[Part, Tensor]]) -> None:
        """Put the values of each part into the tensor beside it, on the CPU; each chunk is read once. Raises: CheckpointError."""
        by_name: dict[str, list[tuple[Part, Tensor]]] = {}
        for part, values in wanted:
            by_name.setdefault(part.tensor.name, []).append((part, values))
        for parts in by_name.values():
            self._read_tensor(kind, parts)

    def _read_tensor(self, kind: str, wanted: Sequence[tuple[Part, Tensor]]) -> None:
        tensor = wanted[0][0].tensor
        if tensor.role is Role.ROUTER:  # small, and the saved one may have more edges
            whole = self.tensor(kind, tensor)
            for part, values in wanted:
                values.copy_(whole[part.logical.slices()])
            return
        for chunk in self._reader.chunks(kind, tensor):
            meeting = [(part, values, common(part.logical, chunk.box)) for part, values in wanted]
            if any(both is not None for _, _, both in meeting):
                found = torch.from_numpy(self._reader.read(chunk))
                for part, values, both in meeting:
                    if both is not None:
                        values[both.within(part.logical)] = found[both.within(chunk.box)]

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
