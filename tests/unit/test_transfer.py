"""The transfer plan: every edge is served once by what is there, `relay` is plain, `least` is the least there is."""

from __future__ import annotations

import random
from itertools import product

import pytest

from lime_dist.depth.pattern import Pattern, none_pattern, parse_pattern
from lime_dist.errors import PlanError
from lime_dist.plan.partition import plan_partition
from lime_dist.plan.transfer import TransferPlan, plan_transfer

PATTERNS = ("full", "first:1", "first:2", "last:1", "last:2", "last:3", "stride:2", "stride:3")


def make_plan(text: str, counts: list[int], policy: str, costs: list[float] | None = None) -> TransferPlan:
    num_layers = sum(counts)
    pattern = none_pattern(num_layers) if text == "none" else parse_pattern(text, num_layers)
    return plan_transfer(pattern, plan_partition(num_layers, len(counts), counts), policy=policy, boundary_cost=costs)


def random_case(seed: int) -> tuple[Pattern, tuple[range, ...], list[float]]:
    """Any pattern at all, over two to four stages, with costs."""
    dice = random.Random(seed)
    num_layers = dice.randint(4, 6)
    num_stages = dice.randint(2, min(4, num_layers))
    cuts = [0, *sorted(dice.sample(range(1, num_layers), num_stages - 1)), num_layers]
    sources = tuple(
        (*(source for source in range(reader) if dice.random() < 0.6), reader) for reader in range(num_layers)
    )
    stages = tuple(range(first, stop) for first, stop in zip(cuts, cuts[1:]))
    return Pattern(f"random {seed}", sources), stages, [dice.choice([0.5, 1, 1, 2, 7]) for _ in stages[1:]]


# ---- relay


RELAYED = [  # pattern, layers of each stage, raw entries over each boundary
    ("full", [1, 1, 2], [[0], [0, 1]]),
    ("full", [3], []),
    ("last:1", [2, 2, 2], [[1], [3]]),
    ("last:3", [1, 1, 1, 3], [[0], [0, 1], [0, 1, 2]]),
    ("last:2", [2, 2, 2], [[0, 1], [2, 3]]),
    ("first:1", [2, 2, 2], [[0, 1], [0, 3]]),
    ("first:2", [3, 1, 1], [[0, 1, 2], [0, 1, 3]]),
    ("stride:2", [2, 1, 3], [[0, 1], [0, 2]]),
    ("none", [1, 2, 1], [[], []]),
]


@pytest.mark.parametrize(("text", "counts", "crossing"), RELAYED)
def test_relay_carries_entries_to_their_last_readers_and_no_sums(
    text: str, counts: list[int], crossing: list[list[int]]
) -> None:
    boundaries = make_plan(text, counts, "relay").boundaries
    assert [list(boundary.raw_entries) for boundary in boundaries] == crossing
    assert not any(boundary.partial_sums for boundary in boundaries)


# ---- least


LEAST = [  # stages of as many layers, relay's crossings, the least, in units of one stage's entries (LIMe's full pattern)
    (4, 6, 4),
    (8, 28, 16),
    (16, 120, 64),
]


@pytest.mark.parametrize("layers_per_stage", [1, 3])
@pytest.mark.parametrize(("num_stages", "relayed", "least"), LEAST)
def test_least_of_the_full_pattern(num_stages: int, relayed: int, least: int, layers_per_stage: int) -> None:
    counts = [layers_per_stage] * num_stages
    assert make_plan("full", counts, "relay").num_crossings == relayed * layers_per_stage
    assert make_plan("full", counts, "least").num_crossings == least * layers_per_stage
    by_boundary = [
        len(boundary.raw_entries) + len(boundary.partial_sums)
        for boundary in make_plan("full", counts, "least").boundaries
    ]
    before = [layers_per_stage * (boundary + 1) for boundary in range(num_stages - 1)]
    assert by_boundary == [min(layers, sum(counts) - layers) for layers in before]


@pytest.mark.parametrize("sum_cost", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_least_costs_what_trying_every_plan_finds(seed: int, sum_cost: int) -> None:
    pattern, stages, costs = random_case(seed)
    plan = plan_transfer(pattern, stages, policy="least", boundary_cost=costs, sum_cost=sum_cost)
    assert cost(plan, costs, sum_cost) == least_cost(pattern, stages, costs, sum_cost)
    plan, equal = plan_transfer(pattern, stages, policy="least"), [1.0] * len(costs)
    assert cost(plan, equal) == least_cost(pattern, stages, equal)


def cost(plan: TransferPlan, costs: list[float], sum_cost: int = 1) -> float:
    return sum(
        costs[boundary.boundary] * (len(boundary.raw_entries) + sum_cost * len(boundary.partial_sums))
        for boundary in plan.boundaries
    )


def least_cost(pattern: Pattern, stages: tuple[range, ...], costs: list[float], sum_cost: int = 1) -> float:
    """Every way to carry raw entries; given that, a sum is best started as late as its sources allow."""
    stage_of = [index for index, layers in enumerate(stages) for _ in layers]
    best = float("inf")
    for raw_until in product(*(range(stage, len(stages)) for stage in stage_of)):
        total = sum(sum(costs[made:until]) for made, until in zip(stage_of, raw_until))
        for reader, sources in enumerate(pattern.sources):
            start = min(stage_of[reader], *(raw_until[source] for source in sources))
            total += sum_cost * sum(costs[start : stage_of[reader]])
        best = min(best, total)
    return best


# ---- both


CASES = [
    *((text, counts) for text in (*PATTERNS, "none") for counts in ([6], [3, 3], [1, 5], [2, 1, 3], [2, 2, 1, 1])),
    ("full", [1] * 8),
    ("block:2", [2, 4, 2]),
    ("block:3+first:1", [3, 3, 2]),
    ("stride:3", [2, 3, 2, 4]),
]


@pytest.mark.parametrize("policy", ["relay", "least"])
@pytest.mark.parametrize(("text", "counts"), CASES)
def test_every_edge_is_added_once_where_all_it_needs_is_present(text: str, counts: list[int], policy: str) -> None:
    assert_served(make_plan(text, counts, policy))


@pytest.mark.parametrize("policy", ["relay", "least"])
@pytest.mark.parametrize("seed", range(30))
def test_every_edge_of_any_pattern_is_added_once(seed: int, policy: str) -> None:
    pattern, stages, _ = random_case(seed)
    assert_served(plan_transfer(pattern, stages, policy=policy))


def assert_served(plan: TransferPlan) -> None:
    """Walk the stages with what each holds; every router's sources end up in the reader's sum, at the reader's stage."""
    pattern, sums = plan.pattern, {}
    held: tuple[int, ...] = ()
    for index, layers in enumerate(plan.stages):
        stage = plan.stage(index)
        assert stage.received.raw_entries == held, "received is not what was sent"
        assert set(stage.received.partial_sums) <= set(sums)
        sums = {reader: sums[reader] for reader in stage.received.partial_sums}  # what is not sent is lost
        present = {*held, *stage.own_entries(layers)}
        for reader, sources in stage.reads.items():
            assert set(sources) <= present and reader >= layers.start
            sums.setdefault(reader, []).extend(sources)
        for reader in filter(pattern.has_router, layers):
            assert sorted(sums[reader]) == list(pattern.sources[reader])
        assert set(stage.sent.raw_entries) <= present
        assert set(stage.sent.partial_sums) <= set(sums)
        assert all(reader >= layers.stop for reader in stage.sent.partial_sums)
        held = stage.sent.raw_entries
    assert not held


REFUSED = [
    ("most", None, "depth.policy: 'most' is unknown"),
    ("least", [1.0], "pipeline.boundary_cost: [1.0] must be 2 numbers above 0"),
    ("least", [1.0, 0.0], "pipeline.boundary_cost: [1.0, 0.0] must be 2 numbers above 0"),
]


@pytest.mark.parametrize(("policy", "costs", "message"), REFUSED)
def test_what_cannot_be_planned_is_refused(policy: str, costs: list[float] | None, message: str) -> None:
    with pytest.raises(PlanError) as error:
        make_plan("full", [1, 1, 1], policy, costs)
    assert str(error.value).startswith(message)


def test_a_block_over_a_boundary_is_refused() -> None:
    with pytest.raises(PlanError, match="^depth.pattern: the block of layers 2 to 3 spans a stage boundary"):
        make_plan("block:2", [3, 3], "least")
