"""`least` against optima found by other means: the linear programme (HiGHS), and Koenig's bound at every boundary."""

from __future__ import annotations

import random
from itertools import pairwise

import networkx
import numpy
import pytest
from scipy.optimize import linprog

from lime_dist.depth.pattern import Pattern
from lime_dist.plan.transfer import TransferPlan, chunk_of_layers, plan_transfer


def random_plan(
    seed: int, most_layers: int, most_stages: int, virtual_stages: int = 1
) -> tuple[TransferPlan, list[float]]:
    """`least` of any pattern at all over any chunks, under any costs: the plan, and the cost of each hop."""
    dice = random.Random(seed)
    num_layers = dice.randint(2 * virtual_stages, most_layers)
    num_stages = dice.randint(2, min(num_layers // virtual_stages, most_stages))
    num_hops = num_stages * virtual_stages - 1
    cuts = [0, *sorted(dice.sample(range(1, num_layers), num_hops)), num_layers]
    share = dice.random()
    sources = tuple((*(i for i in range(j) if dice.random() < share), j) for j in range(num_layers))
    costs = [dice.choice([0.5, 1.0, 2.0, 3.0]) for _ in range(min(num_hops, num_stages))]
    chunks = tuple(range(first, stop) for first, stop in pairwise(cuts))
    pattern = Pattern("random", sources)
    plan = plan_transfer(pattern, chunks, policy="least", num_stages=num_stages, boundary_cost=costs)
    return plan, [costs[hop % num_stages] for hop in range(num_hops)]


def crossing_edges(plan: TransferPlan) -> list[tuple[int, int]]:
    """(source, reader) of different stages."""
    stage_of = [chunk % plan.num_stages for chunk in chunk_of_layers(plan.chunks)]
    pairs = ((i, j) for j, sources in enumerate(plan.pattern.sources) for i in sources)
    return [(i, j) for i, j in pairs if stage_of[i] != stage_of[j]]


def linear_optimum(plan: TransferPlan, costs: list[float]) -> float:
    """Over 0 <= x[i, c], y[j, c] <= 1: raw i crosses hop c, the sum of j crosses c.

    An edge spans the hops from the last chunk of the source's stage to the reader's: over each the sum crosses, or else
    the raw entry, which did so where the same boundary came first after its own chunk.
    """
    chunk_of, edges, num_stages = chunk_of_layers(plan.chunks), crossing_edges(plan), plan.num_stages
    raw = {
        (i, c) for i in range(len(chunk_of)) for c in range(chunk_of[i], min(chunk_of[i] + num_stages - 1, len(costs)))
    }
    sums = {(j, c) for j in range(len(chunk_of)) for c in range(max(0, chunk_of[j] - num_stages + 1), chunk_of[j])}
    column = {key: place for place, key in enumerate([*(("raw", *k) for k in raw), *(("sum", *k) for k in sums)])}
    rows, bounds = [], []

    def at_most(terms: dict[tuple, float], bound: float) -> None:
        row = numpy.zeros(len(column))
        for key, factor in terms.items():
            row[column[key]] = factor
        rows.append(row)
        bounds.append(bound)

    for i, c in raw:
        if (i, c + 1) in raw:
            at_most({("raw", i, c + 1): 1, ("raw", i, c): -1}, 0)
    for j, c in sums:
        if (j, c + 1) in sums:
            at_most({("sum", j, c): 1, ("sum", j, c + 1): -1}, 0)
    for i, j in edges:
        last_own = max(p for p in range(chunk_of[j]) if (p - chunk_of[i]) % num_stages == 0)
        for hop in range(last_own, chunk_of[j]):
            at_most({("raw", i, chunk_of[i] + hop - last_own): -1, ("sum", j, hop): -1}, -1)
    if not edges:
        return 0.0
    weights = [costs[key[2]] for key in column]
    return linprog(weights, A_ub=numpy.array(rows), b_ub=bounds, bounds=(0, 1), method="highs").fun


@pytest.mark.parametrize("virtual_stages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(40))
def test_least_is_the_linear_programmes_optimum(seed: int, virtual_stages: int) -> None:
    plan, costs = random_plan(
        seed, most_layers=16 if virtual_stages > 1 else 12, most_stages=5, virtual_stages=virtual_stages
    )
    cost = sum(costs[hop.hop] * (len(hop.raw_entries) + len(hop.partial_sums)) for hop in plan.hops)
    assert cost == pytest.approx(linear_optimum(plan, costs), abs=1e-6)


@pytest.mark.parametrize("virtual_stages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(60))
def test_least_is_the_minimum_vertex_cover_at_every_boundary(seed: int, virtual_stages: int) -> None:
    """Hence the least in total, at the peak and under any costs."""
    plan, _ = random_plan(seed, most_layers=20, most_stages=7, virtual_stages=virtual_stages)
    num_stages, chunk_of = plan.num_stages, chunk_of_layers(plan.chunks)
    for boundary in range(num_stages):
        spanning = [
            (i, j)
            for i, j in crossing_edges(plan)
            if (boundary - chunk_of[i]) % num_stages < (chunk_of[j] - chunk_of[i]) % num_stages
        ]
        graph = networkx.Graph((("source", i), ("reader", j)) for i, j in spanning)
        matching = networkx.bipartite.hopcroft_karp_matching(graph, {("source", i) for i, _ in spanning})
        hops = plan.hops[boundary::num_stages]
        assert sum(len(hop.raw_entries) + len(hop.partial_sums) for hop in hops) == len(matching) // 2


@pytest.mark.parametrize("seed", range(40))
def test_costs_change_no_plan(seed: int) -> None:
    """As every boundary has its least by itself."""
    plan, _ = random_plan(seed, most_layers=20, most_stages=5, virtual_stages=1 + seed % 3)
    assert plan == plan_transfer(plan.pattern, plan.chunks, policy="least", num_stages=plan.num_stages)
