"""LIMe v2: a layer's keys and values are mixed from the raw ones of earlier layers (arXiv 2502.09245v2, section 3)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from lime_dist.config import ModelConfig
from lime_dist.lime.depth_memory import DepthMemory, Run
from lime_dist.lime.layers import Attention, OwnAttention, Pass
from lime_dist.lime.parts import Parts
from lime_dist.plan.transfer import ChunkTransfer


class Router(nn.Module):
    """R of one reader over the sources that are added on this chunk: [H_kv (reader head), sources, H_kv (source head)].

    Static, signed, unnormalised (arXiv 2502.09245v2, section 3). sources: ascending; those from `first_own` on are made here.
    """

    def __init__(self, num_kv_heads: int, sources: tuple[int, ...], first_own: int, parts: Parts):
        super().__init__()
        shape = (num_kv_heads, len(sources), num_kv_heads)
        self.weight = nn.Parameter(torch.empty(shape, dtype=parts.dtype, device=parts.device))
        self.sources, self._parts = sources, parts
        self.own = tuple(source for source in sources if source >= first_own)

    def among(self, layers: Collection[int]) -> tuple[int, ...]:
        """Those of the sources that are among `layers`."""
        return tuple(source for source in self.sources if source in layers)

    def weight_of(self, some: tuple[int, ...]) -> Tensor:
        """The columns of `some` of the sources [H_kv, len(some), H_kv]."""
        places = [self.sources.index(source) for source in some]
        if places == list(range(places[0], places[-1] + 1)):
            return self._parts.for_tokens(self.weight[:, places[0] : places[-1] + 1])
        return self._parts.for_tokens(torch.stack([self.weight[:, place] for place in places], dim=1))


class KeyValueAttention(OwnAttention):
    """Leaves its raw keys and values [H_kv, 2, tokens, head_dim] as its entry; with a router it attends to the mix of all."""

    def __init__(self, model: ModelConfig, layer: int, router: Router | None, parts: Parts):
        super().__init__(model, layer, parts)
        self.lime_router = router

    def project(self, residual: Tensor, normed: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        queries, kv, chain = super().project(residual, normed, chain, run)
        entry = self._parts.heads_to_tokens(kv)
        chain = run.memory.write(self.layer, entry, chain)
        if self.lime_router is None:
            return queries, kv, chain
        router = self.lime_router
        routed = run.memory.read(self.layer, router.weight_of(router.own), router.own, chain)
        return queries, self._parts.tokens_to_heads(routed.view(entry.shape)), chain


class KeyValueDepth:
    """The routers of one chunk, and the sums that they begin or go on with for layers of any chunk."""

    def __init__(self, model: ModelConfig, transfer: ChunkTransfer, layers: range, parts: Parts):
        self._model, self._parts, self._entries = model, parts, transfer.own_entries(layers)
        self._routers = {
            reader: Router(model.kv_heads, sources, layers.start, parts) for reader, sources in transfer.reads.items()
        }
        self.partial_routers = {reader: router for reader, router in self._routers.items() if reader not in layers}

    def attention(self, layer: int) -> Attention:
        if layer not in self._entries:
            return OwnAttention(self._model, layer, self._parts)
        return KeyValueAttention(self._model, layer, self._routers.get(layer), self._parts)

    def add_received(self, memory: DepthMemory, chain: Tensor) -> Tensor:
        """All that this chunk reads of entries made before it, for its own layers and for partial sums: a product a run."""
        for run in memory.runs_before():
            chain = self._add(memory, run, self._routers, chain)
        return chain

    def add_own(self, memory: DepthMemory, chain: Tensor) -> Tensor:
        """What this chunk's own entries add to the sums of later chunks' layers: one product."""
        for run in memory.runs_made():
            chain = self._add(memory, run, self.partial_routers, chain)
        return chain

    def _add(self, memory: DepthMemory, run: Run, routers: Mapping[int, Router], chain: Tensor) -> Tensor:
        layers = memory.layers_of(run)
        sources = {reader: router.among(layers) for reader, router in routers.items()}
        sources = {reader: some for reader, some in sources.items() if some}
        weights = {reader: routers[reader].weight_of(some) for reader, some in sources.items()}
        return memory.add_to_sums(weights, sources, run, chain)
