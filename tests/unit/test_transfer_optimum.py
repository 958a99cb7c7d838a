"""`least` against optima found by other means: the linear programme (HiGHS), and Koenig's bound at every boundary."""

from __future__ import annotations

import random
from itertools import pairwise

import networkx
import numpy
import pytest
from scipy.optimize import linprog

from lime_dist.depth.pattern import Pattern
from lime_dist.plan.transfer import TransferPlan, plan_transfer, stage_of_layers


def random_plan(seed: int, most_layers: int, most_stages: int) -> tuple[TransferPlan, list[float]]:
    """`least` of any pattern at all over any stages, under any costs."""
    dice = random.Random(seed)
    num_layers = dice.randint(2, most_layers)
    num_stages = dice.randint(2, min(num_layers, most_stages))
    cuts = [0, *sorted(dice.sample(range(1, num_layers), num_stages - 1)), num_layers]
    share = dice.random()
    sources = tuple((*(i for i in range(j) if dice.random() < share), j) for j in range(num_layers))
    costs = [dice.choice([0.5, 1.0, 2.0, 3.0]) for _ in range(num_stages - 1)]
    stages = tuple(range(first, stop) for first, stop in pairwise(cuts))
    return plan_transfer(Pattern("random", sources), stages, policy="least", boundary_cost=costs), costs


def crossing_edges(plan: TransferPlan) -> list[tuple[int, int]]:
    """(source, reader) of different stages."""
    stage_of = stage_of_layers(plan.stages)
    pairs = ((i, j) for j, sources in enumerate(plan.pattern.sources) for i in sources)
    return [(i, j) for i, j in pairs if stage_of[i] < stage_of[j]]


def linear_optimum(plan: TransferPlan, costs: list[float]) -> float:
    """Over 0 <= x[i, b], y[j, b] <= 1: raw i crosses boundary b, the sum of j crosses b."""
    stage_of, edges = stage_of_layers(plan.stages), crossing_edges(plan)
    raw = {(i, b) for i in range(len(stage_of)) for b in range(stage_of[i], len(costs))}
    sums = {(j, b) for j in range(len(stage_of)) for b in range(stage_of[j])}
    column = {key: place for place, key in enumerate([*(("raw", *k) for k in raw), *(("sum", *k) for k in sums)])}
    rows, bounds = [], []

    def at_most(terms: dict[tuple, float], bound: float) -> None:
        row = numpy.zeros(len(column))
        for key, factor in terms.items():
            row[column[key]] = factor
        rows.append(row)
        bounds.append(bound)

    for i, b in raw:
        if (i, b + 1) in raw:
            at_most({("raw", i, b + 1): 1, ("raw", i, b): -1}, 0)
    for j, b in sums:
        if (j, b + 1) in sums:
            at_most({("sum", j, b): 1, ("sum", j, b + 1): -1}, 0)
    for i, j in edges:
        for b in range(stage_of[i], stage_of[j]):
            at_most({("raw", i, b): -1, ("sum", j, b): -1}, -1)
    if not edges:
        return 0.0
    weights = [costs[key[2]] for key in column]
    return linprog(weights, A_ub=numpy.array(rows), b_ub=bounds, bounds=(0, 1), method="highs").fun


@pytest.mark.parametrize("seed", range(40))
def test_least_is_the_linear_programmes_optimum(seed: int) -> None:
    plan, costs = random_plan(seed, most_layers=12, most_stages=5)
    cost = sum(costs[b.boundary] * (len(b.raw_entries) + len(b.partial_sums)) for b in plan.boundaries)
    assert cost == pytest.approx(linear_optimum(plan, costs), abs=1e-6)


@pytest.mark.parametrize("seed", range(60))
def test_least_is_the_minimum_vertex_cover_at_every_boundary(seed: int) -> None:
    """Hence the least in total, at the peak and under any costs."""
    plan, _ = random_plan(seed, most_layers=20, most_stages=7)
    stage_of = stage_of_layers(plan.stages)
    for boundary in plan.boundaries:
        spanning = [(i, j) for i, j in crossing_edges(plan) if stage_of[i] <= boundary.boundary < stage_of[j]]
        graph = networkx.Graph((("source", i), ("reader", j)) for i, j in spanning)
        matching = networkx.bipartite.hopcroft_karp_matching(graph, {("source", i) for i, _ in spanning})
        assert len(boundary.raw_entries) + len(boundary.partial_sums) == len(matching) // 2
