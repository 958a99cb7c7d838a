"""The router map: how much each layer reads of which earlier one, from routers that are whole. No torch.

The paper shows mean |R| by reader and source (arXiv 2502.09245v2; v1: softmax weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy

from lime_dist.depth.pattern import Pattern
from lime_dist.depth.routing import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterMap:
    """by_head: [heads of the reader, readers, sources], both by layer; nan where a layer does not read another.

    v2: |R| meaned over the heads of the source. v1: the softmax weights; of a dynamic router their mean over tokens.
    """

    by_head: numpy.ndarray

    @cached_property
    def mean(self) -> numpy.ndarray:
        """[readers, sources]: mean |R| over all pairs of heads."""
        return self.by_head.mean(0)

    @cached_property
    def shares(self) -> numpy.ndarray:
        """[readers, sources]: |R_i| / sum_i |R_i|, zero where nothing is read; rows of layers without a router are nan."""
        weights = numpy.nan_to_num(self.mean)
        totals = weights.sum(1, keepdims=True)
        return numpy.divide(weights, totals, out=numpy.full_like(weights, numpy.nan), where=totals > 0)

    @property
    def own_share(self) -> numpy.ndarray:
        """By reader: the share of sum |R| that its own layer has."""
        return self.shares.diagonal().copy()

    @property
    def expected_source(self) -> numpy.ndarray:
        """By reader: sum_i i |R_i| / sum_i |R_i|, in layers."""
        return self.shares @ numpy.arange(len(self.shares))

    @property
    def edge_weights(self) -> dict[tuple[int, int], float]:
        """(reader, earlier source) -> mean |R|, as `plan/selection.py` takes them."""
        readers, sources = numpy.nonzero(~numpy.isnan(self.mean))
        return {(int(j), int(i)): float(self.mean[j, i]) for j, i in zip(readers, sources) if i < j}


def head_magnitudes(routing: Routing, router: numpy.ndarray) -> numpy.ndarray:
    """[heads of the reader, sources] of a router, or of the part of one over some sources: |R|, mean over what is behind.

    fp64 of a contiguous copy, so that a part has the figures that the whole has there.
    """
    weights = numpy.abs(numpy.ascontiguousarray(routing.source_weights(router), dtype=numpy.float64))
    return weights.mean(axis=tuple(range(2, weights.ndim)))


def map_of_magnitudes(pattern: Pattern, magnitudes: Mapping[int, numpy.ndarray]) -> RouterMap:
    """magnitudes: of each reader [heads, sources], the sources in the order of the pattern."""
    heads = next((len(found) for found in magnitudes.values()), 1)
    by_head = numpy.full((heads, pattern.num_layers, pattern.num_layers), numpy.nan)
    for reader, found in magnitudes.items():
        by_head[:, reader, list(pattern.sources[reader])] = found
    return RouterMap(by_head=by_head)


def map_of_routers(pattern: Pattern, routers: Mapping[int, numpy.ndarray]) -> RouterMap:
    """routers: of each reader its whole router, of a kind of fixed weights."""
    return map_of_magnitudes(
        pattern, {reader: head_magnitudes(pattern.routing, router) for reader, router in routers.items()}
    )
