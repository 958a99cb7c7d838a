"""LIMe v1 (arXiv 2502.09245v1): a layer's normalised input, under a softmax over the sources for each KV head. Pure data.

The weights are fixed, or follow from the reader's own input for each token. `lime/hidden.py` is the read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from lime_dist.depth.routing import ModelSizes, Read, Routing, attention_prefix, keys_values, queries
from lime_dist.plan.tensors import Cutter, LogicalTensor, Normal, ParameterSpec, Role

FP32_BYTES = 4


@dataclass(frozen=True)
class HiddenRouting(Routing):
    """Sums do not cross in place of entries: a reader has a mix for each KV head, each as large as an entry."""

    entry_name = "normalised input"
    presummable = False

    def entry_shape(self, model: ModelSizes, rows: int) -> tuple[int, int]:
        return 1, rows * model.hidden_size

    def reader_parameters(self, cut: Cutter, model: ModelSizes, reader: int) -> Iterator[ParameterSpec]:
        """Queries are made of something else than keys and values, so not in one matrix."""
        prefix = attention_prefix(reader)
        yield cut.columns(f"{prefix}q_proj.weight", [queries(model, reader)])
        yield cut.columns(f"{prefix}kv_proj.weight", keys_values(model, reader))
        yield cut.whole(LogicalTensor(f"{prefix}depth_norm.weight", (model.hidden_size,), Role.NORM))

    def read_flops(self, model: ModelSizes) -> int:
        """A product [H_kv, 1] x [1, hidden], two operations a multiply-add."""
        return 2 * model.kv_heads * model.hidden_size

    def kept_bytes(self, model: ModelSizes, num_sources: int, rows: int, element_bytes: int) -> int:
        """The projection of all heads before and after the reader's gain."""
        return 2 * 2 * model.kv_heads * model.head_dim * model.hidden_size * element_bytes


@dataclass(frozen=True)
class StaticRouting(HiddenRouting):
    """Routers [H_kv, sources]."""

    name = "hidden, static"

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec:
        shape = model.kv_heads, len(read.sources)
        return cut.whole(LogicalTensor(name, shape, Role.ROUTER, Normal(std=0.1)))  # arXiv 2502.09245v1

    def source_weights(self, router: numpy.ndarray) -> numpy.ndarray:
        return softmax(router)


@dataclass(frozen=True)
class DynamicRouting(HiddenRouting):
    """Routers [H_kv * sources, hidden]: linear maps, decayed like other matrices (arXiv 2502.09245v1)."""

    name = "hidden, dynamic"
    fixed_weights = False
    decays_routers = True

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec:
        shape = model.kv_heads * len(read.sources), model.hidden_size
        return cut.whole(LogicalTensor(name, shape, Role.ROUTER))

    def read_flops(self, model: ModelSizes) -> int:
        """With the product that makes the weights."""
        return super().read_flops(model) + 2 * model.kv_heads * model.hidden_size

    def kept_bytes(self, model: ModelSizes, num_sources: int, rows: int, element_bytes: int) -> int:
        """With the weights of each token, of which the softmax keeps fp32 values."""
        weight_bytes = FP32_BYTES if element_bytes == FP32_BYTES else FP32_BYTES + element_bytes
        weights = rows * model.kv_heads * num_sources
        return super().kept_bytes(model, num_sources, rows, element_bytes) + weights * weight_bytes

    def without_sources(self, router: numpy.ndarray, num_sources: int, places: list[int]) -> numpy.ndarray:
        hidden = router.shape[1]
        return router.reshape(-1, num_sources, hidden)[:, places].reshape(-1, hidden)


def softmax(router: numpy.ndarray) -> numpy.ndarray:
    """Over the sources, the last axis: how v1's router weighs them (arXiv 2502.09245v1)."""
    powers = numpy.exp(router - router.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


HIDDEN_STATIC, HIDDEN_DYNAMIC = StaticRouting(), DynamicRouting()
