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
from lime_dist.lime.parts import Parts
from lime_dist.plan.transfer import ChunkTransfer


class Router(nn.Module):
    """Of one reader over the sources that are added on this chunk: [heads of the reader, sources, heads of an entry], as many.

    sources: ascending; those from `first_own` on are made here.
    """

    def __init__(self, num_heads: int, sources: tuple[int, ...], first_own: int, parts: Parts):
        super().__init__()
        shape = (num_heads, len(sources), num_heads)
        self.weight = nn.Parameter(torch.empty(shape, dtype=parts.dtype, device=parts.device))
        self.sources, self._parts = sources, parts
        self.own = tuple(source for source in sources if source >= first_own)

    def among(self, layers: Collection[int]) -> tuple[int, ...]:
        """Those of the sources that are among `layers`."""
        return tuple(source for source in self.sources if source in layers)

    def weight_of(self, some: tuple[int, ...]) -> Tensor:
        """The columns of `some` of the sources [heads, len(some), heads]."""
        places = [self.sources.index(source) for source in some]
        if places == list(range(places[0], places[-1] + 1)):
            return self._parts.for_tokens(self.weight[:, places[0] : places[-1] + 1])
        return self._parts.for_tokens(torch.stack([self.weight[:, place] for place in places], dim=1))


class SummedDepth(Depth):
    """The routers of one chunk, and the sums that they begin or go on with for layers of any chunk."""

    def __init__(self, model: ModelConfig, transfer: ChunkTransfer, layers: range, parts: Parts):
        super().__init__(model, transfer, layers, parts)
        num_heads, _ = transfer.pattern.routing.entry_shape(model, rows=1)
        self.routers = {
            reader: Router(num_heads, sources, layers.start, parts) for reader, sources in transfer.reads.items()
        }
        self._later = {reader: router for reader, router in self.routers.items() if reader not in layers}
        self.partial_routers.update(self._later)

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
