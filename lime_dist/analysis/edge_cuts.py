"""What a trained model loses when only its heaviest edges are kept, and what their bundles weigh.

Routers are cut as they are, without training on: DenseFormer (arXiv 2402.02622) found that this hurts far more than
training with the smaller pattern from the start, so the losses here are upper bounds of what a pattern costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lime_dist.analysis.activations import attentions
from lime_dist.config import Config
from lime_dist.depth.pattern import Pattern
from lime_dist.errors import PlanError
from lime_dist.lime.microbatch import count_targets
from lime_dist.lime.model import LimeChunk, model_loss
from lime_dist.lime.summed import Router
from lime_dist.plan.selection import EdgeWeights, kept_share, select_budget, select_top_p
from lime_dist.plan.shape import plan_shape
from lime_dist.plan.transfer import plan_transfer

SHARES_OF_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
TOP_P = (0.5, 0.7, 0.9)
BUDGET_SHARE = 0.5  # of the run's largest bundle


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Some of a run's edges.

    weight_share: of sum |R| over edges between different layers. largest_bundle_bytes: of one microbatch under the run's own
    stages; None where it has one. loss: held-out, in nats, with the other edges cut.
    """

    rule: str
    edges: int
    weight_share: float
    largest_bundle_bytes: int | None
    loss: float


def measure_cuts(model: LimeChunk, config: Config, weights: EdgeWeights, batches: Sequence[Tensor]) -> list[Kept]:
    """Of every rule, the heaviest edges first; batches: token ids [batch, seq + 1]."""
    found = []
    for rule, pattern in cuts(config, weights):
        with edges_cut(model, pattern):
            loss = mean_loss(model, batches)
        found.append(
            Kept(
                rule=rule,
                edges=pattern.num_edges,
                weight_share=kept_share(weights, pattern),
                largest_bundle_bytes=largest_bundle(config, pattern),
                loss=loss,
            )
        )
    return found


def cuts(config: Config, weights: EdgeWeights) -> Iterator[tuple[str, Pattern]]:
    """The rules and what each keeps of the run's pattern."""
    for share in SHARES_OF_EDGES:
        yield f"heaviest {share:.0%}", heaviest(config.pattern, weights, share)
    for top_p in TOP_P:
        yield f"top_p {top_p:g}", _within(config.pattern, select_top_p(weights, config.model.num_layers, top_p))
    largest = largest_bundle(config, config.pattern)
    if largest is not None:
        try:
            yield f"budget {BUDGET_SHARE:.0%} of the bundle", _within(config.pattern, _budget(config, weights, largest))
        except PlanError:
            return  # the residual stream alone is more


def heaviest(pattern: Pattern, weights: EdgeWeights, share: float) -> Pattern:
    """The `share` of the edges with the largest weights, of all readers together."""
    ordered = sorted(weights, key=lambda edge: (-weights[edge], edge))
    return _keeping(pattern, set(ordered[: round(share * len(ordered))]))


def _budget(config: Config, weights: EdgeWeights, largest: int) -> Pattern:
    return select_budget(
        weights,
        config.chunks,
        num_stages=config.parallel.pp,
        policy=_policy(config),
        bundle_bytes=plan_shape(config).bundle_bytes,
        budget_bytes=int(BUDGET_SHARE * largest),
    )


def _policy(config: Config) -> str:
    return config.depth.policy if config.depth.routing.presummable else "relay"


def _within(pattern: Pattern, chosen: Pattern) -> Pattern:
    return _keeping(pattern, {(reader, source) for reader, sources in chosen.edges.items() for source in sources})


def _keeping(pattern: Pattern, edges: set[tuple[int, int]]) -> Pattern:
    """With the pattern's own kind of routing and blocks."""
    sources = tuple(
        tuple(source for source in known if source == reader or (reader, source) in edges)
        for reader, known in enumerate(pattern.sources)
    )
    return replace(pattern, sources=sources)


def largest_bundle(config: Config, pattern: Pattern) -> int | None:
    """Bytes of the largest bundle of one microbatch under the run's own stages; None where it has one stage."""
    plan = plan_transfer(pattern, config.chunks, num_stages=config.parallel.pp, policy=_policy(config))
    return max(map(plan_shape(config).bundle_bytes, plan.hops), default=None)


@torch.no_grad()
def mean_loss(model: LimeChunk, batches: Sequence[Tensor]) -> float:
    """Mean next-token cross entropy in nats of the targets of batches [batch, seq + 1], token ids or ids with marks."""
    counts = [count_targets(values) for values in batches]
    total = sum(float(model_loss(model, values)) * count for values, count in zip(batches, counts))
    return total / max(1, sum(counts))


@contextmanager
def edges_cut(model: LimeChunk, pattern: Pattern) -> Iterator[None]:
    """The model reads the edges of `pattern` only, some of its own.

    v2: R is zero elsewhere. v1: the softmax runs over the sources that are left. A reader without any keeps its router's weight on its
    own layer.
    """
    with ExitStack() as stack:
        for layer, attention in attentions(model):
            router = getattr(attention, "lime_router", None)
            kept = [source in pattern.sources[layer] for source in model.transfer.pattern.sources[layer]]
            if router is not None and not all(kept):
                cut = _zeroed if isinstance(router, Router) else _renormalised
                stack.enter_context(cut(router, torch.tensor(kept, device=model.device)))
        yield


@contextmanager
def _zeroed(router: nn.Module, kept: Tensor) -> Iterator[None]:
    """A router of fixed weights [heads, sources, heads]."""
    weight: Any = router.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[:, ~kept] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@contextmanager
def _renormalised(router: nn.Module, kept: Tensor) -> Iterator[None]:
    """A router whose forward gives softmax weights [..., sources]."""

    def cut(_: nn.Module, __: Any, weights: Tensor) -> Tensor:
        left = weights.float() * kept
        left[..., -1] += (left.sum(-1) == 0).float()  # of `head_top_p`, where all that is left was pruned
        return (left / left.sum(-1, keepdim=True)).to(weights.dtype)

    handle = router.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()
