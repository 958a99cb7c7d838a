"""Reads that are sums with fixed weights over entries, which a chunk can begin for the readers of later ones.

The other half of a kind that is `presummable`, but for its attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lime_dist.config import ModelConfig
from lime_dist.lime.depth import Depth
from lime_dist.lime.depth_memory import DepthMemory, Run
from lime_dist.lime.parts import Parts, empty_parameter
from lime_dist.plan.transfer import ChunkTransfer


class Router(nn.Module):
    """Of one reader over the sources that are added on this chunk.

    weight: a parameter, or a tensor that is not learned: [heads of the reader, sources, heads of an entry], as many.
    sources: ascending; those from `first_own` on are made here.
    """

    def __init__(self, weight: Tensor, sources: tuple[int, ...], first_own: int, parts: Parts):
        super().__init__()
        self.weight, self.sources, self._parts = weight, sources, parts
        self.own = tuple(source for source in sources if source >= first_own)

    def among(self, layers: Collection[int]) -> tuple[int, ...]:
        """Those of the sources that are among `layers`."""
        return tuple(source for source in self.sources if source in layers)

    def weight_of(self, some: tuple[int, ...]) -> Tensor:
        """The columns of `some` of the sources [heads, len(some), heads]."""
        return self._parts.for_tokens(_columns(self.weight, [self.sources.index(source) for source in some]))


class SameHeadRouter(Router):
    """Where a head reads the same heads only; weight: [heads, sources]."""

    def weight_of(self, some: tuple[int, ...]) -> Tensor:
        weight = super().weight_of(some)
        return weight[..., None] * torch.eye(len(weight), dtype=weight.dtype, device=weight.device)[:, None]


def _columns(weight: Tensor, places: list[int]) -> Tensor:
    """Those at `places` along the second dimension, as a view where they are neighbours."""
    if places == list(range(places[0], places[-1] + 1)):
        return weight[:, places[0] : places[-1] + 1]
    return torch.stack([weight[:, place] for place in places], dim=1)


class SummedDepth(Depth):
    """The routers of one chunk, and the sums that they begin or go on with for layers of any chunk."""

    def __init__(self, model: ModelConfig, transfer: ChunkTransfer, layers: range, parts: Parts):
        super().__init__(model, transfer, layers, parts)
        self.num_heads, _ = transfer.pattern.routing.entry_shape(model, rows=1)
        self.routers = {reader: self.router(reader, sources) for reader, sources in transfer.reads.items()}
        self._later = {reader: router for reader, router in self.routers.items() if reader not in layers}
        self.partial_routers.update(self._later)

    def router(self, reader: int, sources: tuple[int, ...]) -> Router:
        """Of `reader` over those of its sources that this chunk adds."""
        weight = empty_parameter(self.parts, self.num_heads, len(sources), self.num_heads)
        return Router(weight, sources, self.layers.start, self.parts)

    def add_received(self, memory: DepthMemory, chain: Tensor) -> Tensor:
        """All that this chunk reads of entries made before it, for its own layers and for partial sums: a product a run."""
        for run in memory.runs_before():
            chain = self._add(memory, run, self.routers, chain)
        return chain

    def add_own(self, memory: DepthMemory, chain: Tensor) -> Tensor:
        """What this chunk's own entries add to the sums of later chunks' layers: one product."""
        for run in memory.runs_made():
            chain = self._add(memory, run, self._later, chain)
        return chain

    def _add(self, memory: DepthMemory, run: Run, routers: Mapping[int, Router], chain: Tensor) -> Tensor:
        layers = memory.layers_of(run)
        sources = {reader: router.among(layers) for reader, router in routers.items()}
        sources = {reader: some for reader, some in sources.items() if some}
        weights = {reader: routers[reader].weight_of(some) for reader, some in sources.items()}
        return memory.add_to_sums(weights, sources, run, chain)
