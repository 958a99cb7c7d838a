"""Router maps by hand, and what is kept of a model's edges: which, their bytes, the loss without the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lime_dist.analysis.edge_cuts import cuts, edges_cut, heaviest, largest_bundle, mean_loss, measure_cuts
from lime_dist.analysis.routers import map_of_routers
from lime_dist.config import Config, check_config, parse_config
from lime_dist.depth.hidden import HIDDEN_STATIC
from lime_dist.depth.pattern import parse_pattern, pattern_of_edges
from lime_dist.depth.routing import router_name
from lime_dist.lime.model import LimeChunk, plain_model
from lime_dist.lime.values import gather_logical, load, specified_parameters
from lime_dist.plan.selection import kept_share, mean_magnitudes
from lime_dist.plan.tensors import LogicalTensor, Role

BASE = {
    "model": dict(num_layers=4, hidden_size=16, intermediate_size=24, num_heads=2, vocab_size=40),
    "data": {"seq_length": 6, "global_batch_size": 2},
}
# fp32: sums over fewer terms, in another order.
TOLERANCE = 1e-5


def test_a_map_by_hand() -> None:
    """Two heads, three layers; layer 2 reads 0 and itself."""
    pattern = pattern_of_edges({1: [0], 2: [0]}, 3)
    first = np.array([[[1, -3], [4, 0]], [[-2, 2], [0, 6]]], dtype=np.float32)  # [reader head, source, source head]
    second = np.array([[[-1, 1], [1, 1]], [[3, 3], [-1, 7]]], dtype=np.float32)
    found = map_of_routers(pattern, {1: first, 2: second})
    nan = np.nan
    assert np.array_equal(
        found.by_head,
        [[[nan] * 3, [2, 2, nan], [1, nan, 1]], [[nan] * 3, [2, 3, nan], [3, nan, 4]]],
        equal_nan=True,
    )
    assert np.array_equal(found.mean, [[nan] * 3, [2, 2.5, nan], [2, nan, 2.5]], equal_nan=True)
    assert found.own_share == pytest.approx([nan, 2.5 / 4.5, 2.5 / 4.5], nan_ok=True)
    assert found.expected_source == pytest.approx([nan, 2.5 / 4.5, 5 / 4.5], nan_ok=True)
    assert found.edge_weights == {(1, 0): 2.0, (2, 0): 2.0}
    assert found.edge_weights == mean_magnitudes({1: first, 2: second}, dict(enumerate(pattern.sources)))


def test_a_map_of_softmax_weights() -> None:
    pattern = parse_pattern("full", 2)
    pattern = type(pattern)(pattern.name, pattern.sources, routing=HIDDEN_STATIC)
    found = map_of_routers(pattern, {1: np.log(np.array([[1.0, 3.0], [2.0, 2.0]]))})
    assert found.by_head[:, 1] == pytest.approx(np.array([[0.25, 0.75], [0.5, 0.5]]))
    assert found.own_share[1] == pytest.approx(0.625)


# ---- cuts


def make(*overrides: str) -> tuple[LimeChunk, Config]:
    config = check_config(parse_config(BASE, overrides))
    model = plain_model(config.model, config.pattern)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for _, parameter in specified_parameters(model):
            parameter.normal_(0, 0.5, generator=generator)
    return model, config


def make_batches() -> list[Tensor]:
    return list(torch.randint(40, (2, 2, 7), generator=torch.Generator().manual_seed(3)))


KINDS = {
    "kv": (),
    "hidden": ("depth.entry=hidden",),
    "dynamic": ("depth.entry=hidden", "depth.router=dynamic"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cut_edges_are_those_that_a_smaller_pattern_lacks(kind: str) -> None:
    """The loss of a model of that pattern, made of the same weights; the cut model is whole again behind it."""
    model, config = make(*KINDS[kind])
    smaller = check_config(config.with_pattern({1: [0], 2: [0], 3: [1, 2]}))
    weights = gather_logical(model, lambda parameter: parameter)

    def value(tensor: LogicalTensor) -> Tensor:
        if tensor.role is not Role.ROUTER:
            return weights[tensor.name]
        reader = int(tensor.name.split(".")[1])
        places = [config.pattern.sources[reader].index(source) for source in smaller.pattern.sources[reader]]
        whole = weights[tensor.name].numpy()
        return torch.from_numpy(config.pattern.routing.without_sources(whole, reader + 1, places))

    other, batches = plain_model(smaller.model, smaller.pattern), make_batches()
    load(other, value)
    before = mean_loss(model, batches)
    with edges_cut(model, smaller.pattern):
        cut = mean_loss(model, batches)
    assert cut == pytest.approx(mean_loss(other, batches), rel=TOLERANCE)
    assert abs(cut - before) > 100 * TOLERANCE
    assert mean_loss(model, batches) == before


@torch.no_grad()
def test_a_reader_that_loses_all_keeps_its_own_layer() -> None:
    model, config = make()
    with edges_cut(model, pattern_of_edges({}, 4)):
        cut = mean_loss(model, make_batches())
    for reader in (1, 2, 3):
        router = dict(model.named_parameters())[router_name(reader)]
        router[:, :-1] = 0
    assert cut == pytest.approx(mean_loss(model, make_batches()), rel=TOLERANCE)


WEIGHTS = {(1, 0): 4.0, (2, 0): 1.0, (2, 1): 3.0, (3, 0): 2.0, (3, 1): 5.0, (3, 2): 5.0}


def test_the_heaviest_edges() -> None:
    pattern = parse_pattern("full", 4)
    assert heaviest(pattern, WEIGHTS, 0.0).edges == {}
    assert heaviest(pattern, WEIGHTS, 0.5).edges == {1: [0], 3: [1, 2]}
    assert heaviest(pattern, WEIGHTS, 1.0) == pattern
    assert kept_share(WEIGHTS, heaviest(pattern, WEIGHTS, 0.5)) == pytest.approx(14 / 20)


def test_rules_and_their_bundles() -> None:
    """Two stages of two layers; a microbatch of 12 tokens: 768 bytes of residual, and as many of keys and values twice."""
    _, config = make("parallel.pp=2")
    found = dict(cuts(config, WEIGHTS))
    residual, entry = 12 * 16 * 4, 12 * 2 * 16 * 4
    assert largest_bundle(config, config.pattern) == residual + 2 * entry
    # Edges over the boundary are (2,0), (2,1), (3,0), (3,1).
    assert found["heaviest 50%"].edges == {1: [0], 3: [1, 2]}
    assert largest_bundle(config, found["heaviest 50%"]) == residual + entry
    assert found["top_p 0.5"].edges == {1: [0], 2: [1], 3: [1, 2]}
    # Half of 3840 bytes holds no entry beside the residual: only edges within stages are left.
    assert found["budget 50% of the bundle"].edges == {1: [0], 3: [2]}
    _, one_stage = make()
    assert largest_bundle(one_stage, one_stage.pattern) is None
    assert not [rule for rule, _ in cuts(one_stage, WEIGHTS) if rule.startswith("budget")]


def test_all_edges_kept_is_the_model_itself() -> None:
    model, config = make("parallel.pp=2")
    batches = make_batches()
    found = {kept.rule: kept for kept in measure_cuts(model, config, WEIGHTS, batches)}
    assert found["heaviest 100%"].loss == mean_loss(model, batches) != found["heaviest 0%"].loss
    assert (found["heaviest 100%"].weight_share, found["heaviest 0%"].edges) == (1.0, 0)
    assert all(kept.edges <= 6 and kept.weight_share <= 1 for kept in found.values())
