"""LIMe v2: a layer's keys and values are mixed from the raw ones of earlier layers (arXiv 2502.09245v2, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lime_dist.config import ModelConfig
from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.layers import Attention, OwnAttention, Pass
from lime_dist.lime.parts import Parts
from lime_dist.plan.transfer import ChunkTransfer


class Router(nn.Module):
    """R of one reader over the sources that are added on this stage: [H_kv (reader head), sources, H_kv (source head)].

    Static, signed, unnormalised (arXiv 2502.09245v2, section 3). `received` and `own` split the sources,
    ascending, into entries that came from earlier stages and those made here.
    """

    def __init__(self, num_kv_heads: int, sources: tuple[int, ...], first_own: int, parts: Parts):
        super().__init__()
        shape = (num_kv_heads, len(sources), num_kv_heads)
        self.weight = nn.Parameter(torch.empty(shape, dtype=parts.dtype, device=parts.device))
        self.received = tuple(source for source in sources if source < first_own)
        self.own = tuple(source for source in sources if source >= first_own)
        self._parts = parts

    def received_weight(self) -> Tensor:
        return self._parts.for_tokens(self.weight[:, : len(self.received)])

    def own_weight(self) -> Tensor:
        return self._parts.for_tokens(self.weight[:, len(self.received) :])


class KeyValueAttention(OwnAttention):
    """Leaves its raw keys and values [H_kv, 2, tokens, head_dim] as its entry; with a router it attends to the mix of all."""

    def __init__(self, model: ModelConfig, layer: int, router: Router | None, parts: Parts):
        super().__init__(model, layer, parts)
        self.lime_router = router

    def project(self, residual: Tensor, normed: Tensor, token: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        queries, kv, token = super().project(residual, normed, token, run)
        entry = self._parts.heads_to_tokens(kv)
        token = run.memory.write(self.layer, entry, token)
        if self.lime_router is None:
            return queries, kv, token
        router = self.lime_router
        routed = run.memory.read(self.layer, router.own_weight(), router.own, token)
        return queries, self._parts.tokens_to_heads(routed.view(entry.shape)), token


class KeyValueDepth:
    """The routers of one stage, and the sums that they begin or go on with for layers of any stage."""

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

    def add_received(self, memory: DepthMemory, token: Tensor) -> Tensor:
        """All that this stage reads of the received entries, for its own layers and for partial sums: one product."""
        routers = {reader: router for reader, router in self._routers.items() if router.received}
        weights = {reader: router.received_weight() for reader, router in routers.items()}
        sources = {reader: router.received for reader, router in routers.items()}
        return memory.add_to_sums(weights, sources, memory.received, token)

    def add_own(self, memory: DepthMemory, token: Tensor) -> Tensor:
        """What this stage's own entries add to the sums of later stages' layers: one product."""
        routers = {reader: router for reader, router in self.partial_routers.items() if router.own}
        weights = {reader: router.own_weight() for reader, router in routers.items()}
        sources = {reader: router.own for reader, router in routers.items()}
        return memory.add_to_sums(weights, sources, memory.own, token)
