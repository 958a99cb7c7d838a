"""LIMe v2: a layer's keys and values are mixed from the raw ones of earlier layers (arXiv 2502.09245v2, section 3).

Routers are static, signed, unnormalised: [H_kv (reader head), sources, H_kv (source head)], but for the ablations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lime_dist.config import ModelConfig
from lime_dist.depth.key_value import KeyValueRouting
from lime_dist.lime.layers import Attention, OwnAttention, Pass
from lime_dist.lime.parts import Parts, empty_parameter
from lime_dist.lime.summed import Router, SameHeadRouter, SummedDepth


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


class KeyValueDepth(SummedDepth):
    def router(self, reader: int, sources: tuple[int, ...]) -> Router:
        routing = self.transfer.pattern.routing
        if isinstance(routing, KeyValueRouting) and routing.heads == "all":
            return super().router(reader, sources)
        weight: Tensor = empty_parameter(self.parts, self.num_heads, len(sources))
        if not isinstance(routing, KeyValueRouting):
            weight = torch.full_like(weight, 1 / len(self.transfer.pattern.sources[reader]), requires_grad=False)
        return SameHeadRouter(weight, sources, self.layers.start, self.parts)

    def routed(self, layer: int) -> Attention:
        return KeyValueAttention(self.model, layer, self.routers.get(layer), self.parts)
