"""LIMe v1 (arXiv 2502.09245v1): a layer's normalised input, under a softmax over the sources for each KV head. Pure data.

The weights are fixed, or follow from the reader's own entry for each token. `lime/hidden.py` is the read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from lime_dist.depth.routing import ModelSizes, Read, Routing, attention_prefix, keys_values, queries
from lime_dist.plan.tensors import Cutter, LogicalTensor, Normal, ParameterSpec, Role, Uniform

FP32_BYTES = 4


@dataclass(frozen=True)
class HiddenRouting(Routing):
    """Sums do not cross in place of entries: a reader has a mix for each KV head, each as large as an entry."""

    entry_name = "normalised input"
    presummable = False

    def entry_shape(self, model: ModelSizes, rows: int) -> tuple[int, int]:
        return 1, rows * model.hidden_size

    def reader_parameters(self, cut: Cutter, model: ModelSizes, reader: int) -> Iterator[ParameterSpec]:
        """Queries are made of something else than keys and values, so not in one matrix.

        K and V begin as in the authors' code: kaiming_uniform(a = sqrt 5) over a tensor of four dimensions, whose fan-in is
        hidden^2.
        """
        prefix = attention_prefix(reader)
        yield cut.columns(f"{prefix}q_proj.weight", [queries(model, reader)])
        yield cut.columns(f"{prefix}kv_proj.weight", keys_values(model, reader, Uniform(bound=1 / model.hidden_size)))
        yield cut.whole(LogicalTensor(f"{prefix}depth_norm.weight", (model.hidden_size,), Role.NORM))

    def read_flops(self, model: ModelSizes) -> int:
        """A product [H_kv, 1] x [1, hidden], two operations a multiply-add."""
        return 2 * model.kv_heads * model.hidden_size

    def kept_bytes(self, model: ModelSizes, num_sources: int, rows: int, element_bytes: int) -> int:
        """The projection of all heads before and after the reader's gain."""
        return 2 * 2 * model.kv_heads * model.head_dim * model.hidden_size * element_bytes


@dataclass(frozen=True)
class StaticRouting(HiddenRouting):
    """Routers [H_kv, sources].

    head_top_p: keep of each head its largest weights, own layer included, up to the one with which they reach this share, and
    divide them by their sum, as v1 prunes trained routers; None: keep all.
    """

    head_top_p: float | None = None

    name = "hidden, static"

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec:
        shape = model.kv_heads, len(read.sources)
        return cut.whole(LogicalTensor(name, shape, Role.ROUTER, Normal(std=0.1)))  # arXiv 2502.09245v1

    def source_weights(self, router: numpy.ndarray) -> numpy.ndarray:
        weights = softmax(router)
        return weights if self.head_top_p is None else pruned(weights, self.head_top_p)


@dataclass(frozen=True)
class DynamicRouting(HiddenRouting):
    """Routers [H_kv * sources, hidden]: linear maps, decayed like other matrices (arXiv 2502.09245v1).

    head_top_p: as of `StaticRouting`, for each token.
    """

    head_top_p: float | None = None

    name = "hidden, dynamic"
    ranks_edges = False
    decays_routers = True

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec:
        shape = model.kv_heads * len(read.sources), model.hidden_size
        return cut.whole(LogicalTensor(name, shape, Role.ROUTER))

    def read_flops(self, model: ModelSizes) -> int:
        """With the product that makes the weights."""
        return super().read_flops(model) + 2 * model.kv_heads * model.hidden_size

    def kept_bytes(self, model: ModelSizes, num_sources: int, rows: int, element_bytes: int) -> int:
        """With the weights of each token, of which the softmax keeps fp32 values, and what they are made of: the reader's
        own entry and the same with its gain."""
        weight_bytes = FP32_BYTES if element_bytes == FP32_BYTES else FP32_BYTES + element_bytes
        weights = rows * model.kv_heads * num_sources
        made_of = 2 * rows * model.hidden_size * element_bytes
        return super().kept_bytes(model, num_sources, rows, element_bytes) + weights * weight_bytes + made_of

    def without_sources(self, router: numpy.ndarray, num_sources: int, places: list[int]) -> numpy.ndarray:
        hidden = router.shape[1]
        return router.reshape(-1, num_sources, hidden)[:, places].reshape(-1, hidden)


@dataclass(frozen=True)
class AverageHidden(HiddenRouting):
    """The mean of the sources for every head; nothing is learned."""

    name = "hidden, average"
    ranks_edges = False

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> None:
        return None


def softmax(router: numpy.ndarray) -> numpy.ndarray:
    """Over the sources, the last axis: how v1's router weighs them (arXiv 2502.09245v1)."""
    powers = numpy.exp(router - router.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def pruned(weights: numpy.ndarray, top_p: float) -> numpy.ndarray:
    """Shares [..., sources], of which the largest that together reach `top_p` stay and again sum to 1."""
    order = numpy.argsort(-weights, axis=-1, kind="stable")
    ordered = numpy.take_along_axis(weights, order, -1)
    before = numpy.cumsum(ordered, -1) - ordered
    kept = numpy.zeros_like(weights)
    numpy.put_along_axis(kept, order, numpy.where(before < top_p, ordered, 0), -1)
    return kept / kept.sum(-1, keepdims=True)


HIDDEN_STATIC, HIDDEN_DYNAMIC, HIDDEN_AVERAGE = StaticRouting(), DynamicRouting(), AverageHidden()
