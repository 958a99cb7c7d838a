"""The transfer plan: every edge is served once by what is there, `relay` is plain, `least` is the least there is."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest

from lime_dist.depth.pattern import Pattern, none_pattern, parse_pattern
from lime_dist.errors import PlanError
from lime_dist.plan.partition import plan_partition
from lime_dist.plan.transfer import ChunkTransfer, TransferPlan, plan_transfer

PATTERNS = ("full", "first:1", "first:2", "last:1", "last:2", "last:3", "stride:2", "stride:3")


def make_plan(
    text: str, counts: list[int], policy: str, costs: list[float] | None = None, num_stages: int | None = None
) -> TransferPlan:
    """counts: layers of each chunk."""
    num_layers = sum(counts)
    pattern = none_pattern(num_layers) if text == "none" else parse_pattern(text, num_layers)
    chunks = plan_partition(num_layers, len(counts), counts)
    return plan_transfer(pattern, chunks, policy=policy, num_stages=num_stages, boundary_cost=costs)


def random_layers(dice: random.Random, num_layers: int, num_chunks: int) -> tuple[Pattern, tuple[range, ...]]:
    """Any pattern at all over any chunks."""
    cuts = [0, *sorted(dice.sample(range(1, num_layers), num_chunks - 1)), num_layers]
    sources = tuple(
        (*(source for source in range(reader) if dice.random() < 0.6), reader) for reader in range(num_layers)
    )
    return Pattern("random", sources), tuple(range(first, stop) for first, stop in pairwise(cuts))


def random_case(seed: int) -> tuple[Pattern, tuple[range, ...], list[float]]:
    """Over two to four stages of one chunk, with costs."""
    dice = random.Random(seed)
    num_layers = dice.randint(4, 6)
    pattern, chunks = random_layers(dice, num_layers, dice.randint(2, min(4, num_layers)))
    return pattern, chunks, [dice.choice([0.5, 1, 1, 2, 7]) for _ in chunks[1:]]


def random_virtual_case(seed: int) -> tuple[Pattern, tuple[range, ...], int, list[float]]:
    """Over one to three chunks a stage: pattern, chunks, stages, costs."""
    dice = random.Random(seed)
    num_stages, virtual_stages = dice.choice([(1, 3), (2, 1), (4, 1), (2, 2), (3, 2), (3, 2), (4, 2), (2, 3), (3, 3)])
    num_chunks = num_stages * virtual_stages
    pattern, chunks = random_layers(dice, dice.randint(num_chunks, max(num_chunks, 7)), num_chunks)
    num_boundaries = num_stages if virtual_stages > 1 else num_stages - 1
    return pattern, chunks, num_stages, [dice.choice([0.5, 1, 1, 2, 7]) for _ in range(num_boundaries)]


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
    hops = make_plan(text, counts, "relay").hops
    assert [list(hop.raw_entries) for hop in hops] == crossing
    assert not any(hop.partial_sums for hop in hops)


@pytest.mark.parametrize("seed", range(30))
def test_relay_carries_entries_to_every_stage_that_reads_them_and_no_further(seed: int) -> None:
    pattern, chunks, num_stages, _ = random_virtual_case(seed)
    plan = plan_transfer(pattern, chunks, policy="relay", num_stages=num_stages)
    assert plan.sum_from == plan.chunk_of
    for source, (made_at, until) in enumerate(zip(plan.chunk_of, plan.raw_until)):
        readers = [reader for reader, sources in enumerate(pattern.sources) if source in sources]
        reading = {plan.chunk_of[reader] % num_stages for reader in readers}
        on_the_way = [chunk % num_stages for chunk in range(made_at, until + 1)]
        assert reading <= set(on_the_way) and len(set(on_the_way)) == len(on_the_way)
        assert until == made_at or on_the_way[-1] in reading


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
    by_boundary = [len(hop.raw_entries) + len(hop.partial_sums) for hop in make_plan("full", counts, "least").hops]
    before = [layers_per_stage * (boundary + 1) for boundary in range(num_stages - 1)]
    assert by_boundary == [min(layers, sum(counts) - layers) for layers in before]


VIRTUAL = [  # layers, stages, chunks a stage, relay's crossings of the full pattern, the least
    (32, 4, 1, 48, 32),
    (32, 4, 2, 72, 60),
    (32, 4, 4, 84, 78),
    (128, 16, 2, 1440, 1020),
    (128, 8, 4, 784, 700),
]


@pytest.mark.parametrize(("num_layers", "num_stages", "virtual_stages", "relayed", "least"), VIRTUAL)
def test_crossings_of_the_full_pattern_over_several_chunks_a_stage(
    num_layers: int, num_stages: int, virtual_stages: int, relayed: int, least: int
) -> None:
    counts = [num_layers // (num_stages * virtual_stages)] * (num_stages * virtual_stages)
    plans = {policy: make_plan("full", counts, policy, num_stages=num_stages) for policy in ("relay", "least")}
    assert {policy: plan.num_crossings for policy, plan in plans.items()} == {"relay": relayed, "least": least}
    for plan in plans.values():
        assert_served(plan)


@pytest.mark.parametrize("sum_cost", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_least_costs_what_trying_every_plan_finds(seed: int, sum_cost: int) -> None:
    pattern, stages, costs = random_case(seed)
    assert_least(pattern, stages, len(stages), costs, sum_cost)
    assert_least(pattern, stages, len(stages), None)


@pytest.mark.parametrize("sum_cost", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_least_over_several_chunks_a_stage_costs_what_trying_every_plan_finds(seed: int, sum_cost: int) -> None:
    pattern, chunks, num_stages, costs = random_virtual_case(seed)
    assert_least(pattern, chunks, num_stages, costs, sum_cost)
    assert_least(pattern, chunks, num_stages, None)


def assert_least(
    pattern: Pattern, chunks: tuple[range, ...], num_stages: int, costs: list[float] | None, sum_cost: int = 1
) -> None:
    """The least cost, and of all such plans the one that carries the most raw."""
    plan = plan_transfer(pattern, chunks, policy="least", num_stages=num_stages, boundary_cost=costs, sum_cost=sum_cost)
    hop_costs = [costs[hop % num_stages] if costs else 1.0 for hop in range(len(chunks) - 1)]
    least, raw_until = try_every_plan(pattern, plan.chunk_of, num_stages, hop_costs, sum_cost)
    cost = sum(hop_costs[hop.hop] * (len(hop.raw_entries) + sum_cost * len(hop.partial_sums)) for hop in plan.hops)
    assert (cost, plan.raw_until) == (least, raw_until)


def try_every_plan(
    pattern: Pattern, chunk_of: Sequence[int], num_stages: int, hop_costs: list[float], sum_cost: int
) -> tuple[float, tuple[int, ...]]:
    """The least cost, and how far each raw entry goes at most among the plans of that cost.

    Every way to carry raw entries; given that, a sum is best begun as late as its sources allow.
    """
    reach = [range(made_at, min(made_at + num_stages, len(hop_costs) + 1)) for made_at in chunk_of]
    least, farthest = float("inf"), tuple(chunk_of)
    for raw_until in product(*reach):
        total = sum(sum(hop_costs[made_at:until]) for made_at, until in zip(chunk_of, raw_until))
        for chunk, sources in zip(chunk_of, pattern.sources):
            start = min(last_seen(chunk_of[source], raw_until[source], chunk, num_stages) for source in sources)
            total += sum_cost * sum(hop_costs[start:chunk])
        if total == least:
            farthest = tuple(map(max, farthest, raw_until))
        elif total < least:
            least, farthest = total, raw_until
    return least, farthest


@cache
def last_seen(made_at: int, until: int, before: int, num_stages: int) -> int:
    """The last chunk, up to `before`, whose stage an entry has come to by then."""
    return max(
        chunk
        for chunk in range(made_at, before + 1)
        if any(chunk % num_stages == came % num_stages for came in range(made_at, min(until, chunk) + 1))
    )


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


VIRTUAL_CASES = [
    *((text, counts, 2) for text in (*PATTERNS, "none") for counts in ([2, 1, 1, 2], [1] * 6)),
    ("full", [1] * 4, 1),
    ("full", [1] * 9, 3),
    ("block:2", [2, 4, 2, 2], 2),
    ("block:3+first:1", [3, 3, 3, 3, 3, 2], 3),
]


@pytest.mark.parametrize("policy", ["relay", "least"])
@pytest.mark.parametrize(("text", "counts", "num_stages"), VIRTUAL_CASES)
def test_every_edge_is_added_once_over_several_chunks_a_stage(
    text: str, counts: list[int], num_stages: int, policy: str
) -> None:
    assert_served(make_plan(text, counts, policy, num_stages=num_stages))


@pytest.mark.parametrize("policy", ["relay", "least"])
@pytest.mark.parametrize("seed", range(30))
def test_every_edge_of_any_pattern_is_added_once(seed: int, policy: str) -> None:
    pattern, stages, _ = random_case(seed)
    assert_served(plan_transfer(pattern, stages, policy=policy))


@pytest.mark.parametrize("policy", ["relay", "least"])
@pytest.mark.parametrize("seed", range(60))
def test_every_edge_of_any_pattern_is_added_once_over_several_chunks_a_stage(seed: int, policy: str) -> None:
    pattern, chunks, num_stages, costs = random_virtual_case(seed)
    assert_served(plan_transfer(pattern, chunks, policy=policy, num_stages=num_stages, boundary_cost=costs))


def assert_served(plan: TransferPlan) -> None:
    check_served(plan, [plan.chunk(chunk_index) for chunk_index in range(len(plan.chunks))])


def check_served(plan: TransferPlan, transfers: Sequence[ChunkTransfer]) -> None:
    """Walk the chunks with what each stage holds; every router's sources end up in the reader's sum, at its chunk."""
    pattern, sums = plan.pattern, {}
    held: list[dict[int, int]] = [{} for _ in range(plan.num_stages)]  # on each stage, entry: chunk that brought it
    for index, (layers, transfer) in enumerate(zip(plan.chunks, transfers, strict=True)):
        present, received, sent = held[index % plan.num_stages], transfer.received, transfer.sent
        assert index == 0 or received == transfers[index - 1].sent, "received is not what was sent"
        assert not present.keys() & received.raw_entries, "crosses to a stage that has it"
        present |= dict.fromkeys((*received.raw_entries, *transfer.own_entries(layers)), index)
        assert set(received.partial_sums) <= sums.keys()
        sums = {reader: sums[reader] for reader in received.partial_sums}  # what is not sent is lost
        for reader, sources in transfer.reads.items():
            assert set(sources) <= present.keys() and reader >= layers.start
            assert reader in layers or reader in sent.partial_sums, "added into a sum that goes nowhere"
            sums.setdefault(reader, []).extend(sources)
        assert transfer.kept == kept_entries(transfer, present, index)
        for reader in filter(pattern.has_router, layers):
            assert sorted(sums.pop(reader)) == list(pattern.sources[reader])
        assert all(present.get(entry) == index for entry in sent.raw_entries), "sent on as it comes or is made"
        assert set(sent.partial_sums) == sums.keys()
    assert not sent.raw_entries and not sent.partial_sums


def kept_entries(transfer: ChunkTransfer, present: dict[int, int], chunk_index: int) -> dict[int, tuple[int, ...]]:
    """Of the entries read, those that came with each earlier chunk."""
    kept: dict[int, tuple[int, ...]] = defaultdict(tuple)
    for entry in sorted({entry for sources in transfer.reads.values() for entry in sources}):
        if present[entry] < chunk_index:
            kept[present[entry]] += (entry,)
    return kept


def test_a_source_is_added_at_one_chunk() -> None:
    plan = make_plan("full", [1] * 6, "least", num_stages=3)
    added = {
        (reader, source): chunk_index
        for chunk_index in range(6)
        for reader, sources in plan.chunk(chunk_index).reads.items()
        for source in sources
    }
    assert added == {
        (reader, source): plan.added_at(reader, source) for reader in range(1, 6) for source in range(reader + 1)
    }


def test_a_stage_keeps_what_it_made_and_received() -> None:
    plan = make_plan("full", [1] * 4, "relay", num_stages=2)
    assert [hop.raw_entries for hop in plan.hops] == [(0,), (1,), (2,)]
    assert [plan.chunk(chunk_index).kept for chunk_index in range(4)] == [{}, {}, {0: (0,)}, {1: (0, 1)}]
    assert [plan.chunk(chunk_index).summed_readers for chunk_index in range(4)] == [(), (1,), (2,), (3,)]


@pytest.mark.parametrize("policy", ["relay", "least"])
def test_between_chunks_of_one_stage_nothing_crosses(policy: str) -> None:
    pattern = Pattern("own stage", ((0,), (1,), (0, 2), (3,)))
    plan = plan_transfer(pattern, plan_partition(4, 4, [1] * 4), policy=policy, num_stages=2)
    assert plan.num_crossings == 0
    assert plan.chunk(2).kept == {0: (0,)} and plan.chunk(2).summed_readers == (2,)


def test_a_kept_entry_is_added_into_a_sum_that_passes_its_stage() -> None:
    """Layer 6 reads layers 3 and 4 as one sum, which comes to the stage of layer 1 on its way."""
    pattern = Pattern("passing", (*((layer,) for layer in range(6)), (1, 3, 4, 6)))
    plan = plan_transfer(pattern, plan_partition(7, 6, [1, 1, 1, 2, 1, 1]), policy="least", num_stages=3)
    assert_served(plan)
    assert [hop.partial_sums for hop in plan.hops] == [(), (), (), (6,), (6,)] and plan.num_crossings == 2
    assert [plan.added_at(6, source) for source in (1, 3, 4, 6)] == [4, 3, 3, 5]
    assert plan.chunk(4).kept == {1: (1,)} and plan.chunk(4).summed_readers == (6,)


# ---- damage


def drop_a_read(transfers: list[ChunkTransfer]) -> None:
    reader, sources = next(iter(transfers[5].reads.items()))
    transfers[5] = replace(transfers[5], reads={**transfers[5].reads, reader: sources[:-1]})


def read_twice(transfers: list[ChunkTransfer]) -> None:
    reader, sources = next(iter(transfers[5].reads.items()))
    transfers[5] = replace(transfers[5], reads={**transfers[5].reads, reader: (*sources, sources[0])})


def send_one_entry_less(transfers: list[ChunkTransfer]) -> None:
    change_hop(transfers, 3, raw_entries=transfers[3].sent.raw_entries[1:])


def send_what_is_there(transfers: list[ChunkTransfer]) -> None:
    """The entry of layer 0, to the stage that made it."""
    change_hop(transfers, 3, raw_entries=(0, *transfers[3].sent.raw_entries))


def send_before_it_is_made(transfers: list[ChunkTransfer]) -> None:
    change_hop(transfers, 2, raw_entries=(*transfers[2].sent.raw_entries, 3))


def lose_a_sum(transfers: list[ChunkTransfer]) -> None:
    change_hop(transfers, 5, partial_sums=transfers[5].sent.partial_sums[1:])


def receive_what_was_not_sent(transfers: list[ChunkTransfer]) -> None:
    transfers[4] = replace(transfers[4], received=transfers[5].received)


def forget_what_is_kept(transfers: list[ChunkTransfer]) -> None:
    transfers[5] = replace(transfers[5], kept={})


def change_hop(transfers: list[ChunkTransfer], hop: int, **changes: tuple[int, ...]) -> None:
    sent = replace(transfers[hop].sent, **changes)
    transfers[hop] = replace(transfers[hop], sent=sent)
    transfers[hop + 1] = replace(transfers[hop + 1], received=sent)


DAMAGES = [
    drop_a_read,
    read_twice,
    send_one_entry_less,
    send_what_is_there,
    send_before_it_is_made,
    lose_a_sum,
    receive_what_was_not_sent,
    forget_what_is_kept,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_plan_is_found_out(damage: Callable[[list[ChunkTransfer]], None]) -> None:
    plan = make_plan("full", [1] * 8, "least", num_stages=4)
    transfers = [plan.chunk(chunk_index) for chunk_index in range(8)]
    check_served(plan, transfers)
    before = list(transfers)
    damage(transfers)
    assert transfers != before
    with pytest.raises(AssertionError):
        check_served(plan, transfers)


def test_an_entry_carried_once_round_is_found_out() -> None:
    plan = make_plan("full", [1] * 8, "relay", num_stages=4)
    assert_served(plan)
    with pytest.raises(AssertionError, match="crosses to a stage that has it"):
        assert_served(replace(plan, raw_until=(4, *plan.raw_until[1:])))


def test_an_entry_that_leaves_after_the_chunk_that_brought_it_is_found_out() -> None:
    plan = make_plan("last:1", [1] * 8, "relay", num_stages=4)
    transfers = [plan.chunk(chunk_index) for chunk_index in range(8)]
    change_hop(transfers, 5, raw_entries=(0, 5))
    with pytest.raises(AssertionError, match="sent on as it comes or is made"):
        check_served(plan, transfers)


# ---- refused


REFUSED = [
    ("most", None, None, "depth.policy: 'most' is unknown"),
    ("least", [1.0], None, "pipeline.boundary_cost: [1.0] must be 3 numbers above 0"),
    ("least", [1.0, 0.0, 1.0], None, "pipeline.boundary_cost: [1.0, 0.0, 1.0] must be 3 numbers above 0"),
    ("least", [1.0], 2, "pipeline.boundary_cost: [1.0] must be 2 numbers above 0, one for each boundary"),
    ("least", [1.0, 1.0, 1.0], 2, "pipeline.boundary_cost: [1.0, 1.0, 1.0] must be 2 numbers above 0"),
    (
        "least",
        None,
        3,
        "parallel.virtual_stages: 4 chunks of layers do not go round 3 stages; give every stage as many",
    ),
]


@pytest.mark.parametrize(("policy", "costs", "num_stages", "message"), REFUSED)
def test_what_cannot_be_planned_is_refused(
    policy: str, costs: list[float] | None, num_stages: int | None, message: str
) -> None:
    with pytest.raises(PlanError) as error:
        make_plan("full", [1] * 4, policy, costs, num_stages)
    assert str(error.value).startswith(message)


def test_a_block_over_a_boundary_is_refused() -> None:
    with pytest.raises(PlanError, match="^depth.pattern: the block of layers 2 to 3 spans a stage boundary"):
        make_plan("block:2", [3, 3], "least")
    with pytest.raises(PlanError, match="^depth.pattern: the block of layers 2 to 3 spans a chunk boundary"):
        make_plan("block:2", [3, 3, 2, 2], "least", num_stages=2)
