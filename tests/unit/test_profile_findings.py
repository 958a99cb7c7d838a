"""What is named of profiles whose faults are known, and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from recorded import MS, Times, make_plan, recorded

from lime_dist.pipeline.step_times import StepTimes
from lime_dist.plan.messages import Message
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.analysis import Analysis
from lime_dist.profiling.profile_files import Profile, RankRecord

LARGE = ("data.seq_length=512", "depth.policy=least")
RATE = 50e6  # bytes a second of each way of each link, whatever else is on the cards of its ranks
Way = tuple[int, int]


def times(plan: RunPlan, slow: Mapping[int, float] = {}, slow_ways: Mapping[Way, float] = {}) -> Times:
    """Passes by FLOPs, 96 ms of all stages a microbatch. slow, slow_ways: times as long, by rank and by (sender, receiver)."""
    flops = sum(chunk.flops.total for chunk in plan.chunks)

    def run(rank: int, operation: Operation) -> int:
        chunk, kind = plan.chunks[operation.action.chunk], operation.action.kind
        runs = sum(one.verb is Verb.RUN for one in chunk.operations[kind])
        whole = 32 * MS * chunk.flops.total / flops * (1 if kind is Kind.FORWARD else 2)
        return round(whole / runs * slow.get(rank, 1.0))

    def link(sender: int, receiver: int, message: Message) -> int:
        return round(1e9 * message.num_bytes / RATE * slow_ways.get((sender, receiver), 1.0))

    return Times(run=run, link=link)


def named(profile: Profile) -> list[str]:
    return [fault.name.split(" (")[0] for fault in Analysis(profile).faults]


def of(*overrides: str, slow: Mapping[int, float] = {}, slow_ways: Mapping[Way, float] = {}) -> Profile:
    plan = make_plan(*overrides)
    return recorded(plan, *[times(plan, slow, slow_ways)] * 2)


def test_links_that_do_not_share_cards_are_alike() -> None:
    """Messages of both ways are beside each other all the time and none is slower for it."""
    assert named(of("parallel.pp=4", *LARGE)) == []


@pytest.mark.parametrize(
    ("ways", "name"),
    [
        ([(1, 2)], "the way 1>2"),
        ([(3, 2)], "the way 3>2"),
        ([(1, 2), (2, 1)], "the link 1>2"),
        ([(1, 2), (2, 1), (0, 1), (1, 0)], "the links of stage 1, 0>1 and 1>2"),
    ],
)
def test_slow_ways(ways: list[Way], name: str) -> None:
    assert named(of("parallel.pp=4", *LARGE, slow_ways=dict.fromkeys(ways, 8.0))) == [name]


def test_of_one_boundary_the_ways_are_compared() -> None:
    assert named(of("parallel.pp=2", *LARGE)) == []
    assert named(of("parallel.pp=2", *LARGE, slow_ways={(0, 1): 8.0})) == ["the way 0>1"]


# ---- cores


def _short_of_cores(profile: Profile, shares: Mapping[int, float]) -> Profile:
    """That each rank was ready and had no core for a share of each RUN."""
    return replace(
        profile, ranks=tuple(_short_of_a_core(profile.plan, one, shares.get(one.rank, 0.0)) for one in profile.ranks)
    )


def _short_of_a_core(plan: RunPlan, record: RankRecord, share: float) -> RankRecord:
    stage = plan.stages[plan.layout.coordinate(record.rank).pp_rank]
    shares = [share * (operation.verb is Verb.RUN) for operation in stage.operations(stage.actions)]

    def short(step: StepTimes) -> StepTimes:
        taken = [end - begin for begin, end in pairwise(step.marks)]
        lost = [0, *(round(one * seconds) for one, seconds in zip(shares, taken[1:]))]
        delayed = [*accumulate([*lost, *(len(taken) - len(lost)) * [0]], initial=0)]
        busy = [mark - count for mark, count in zip(step.marks, delayed, strict=True)]
        return replace(step, busy=busy, delayed=delayed)

    return replace(record, steps=tuple(map(short, record.steps)))


def test_what_takes_longer_for_want_of_a_core_is_no_slow_stage() -> None:
    """As where ranks share cores: all are short of one, and the last stage is so most, as it computes when all others do."""
    longer = {0: 1.2, 1: 1.25, 2: 1.25, 3: 1.6}
    profile = of("parallel.pp=4", "depth.router=none", slow=longer)
    assert named(profile) == ["stage 3"]
    assert named(_short_of_cores(profile, {rank: 1 - 1 / times for rank, times in longer.items()})) == []


def test_a_rank_that_alone_is_short_of_a_core_is_named() -> None:
    profile = of("parallel.pp=4", "depth.router=none", slow={2: 1.6})
    assert named(_short_of_cores(profile, {0: 0.02, 1: 0.02, 2: 0.375, 3: 0.02})) == ["stage 2"]


# ---- the step


def test_a_step_is_what_a_run_takes_for_each_where_ranks_end_apart() -> None:
    """One rank's optimizer takes longer: the others begin the next step meanwhile."""
    plan = make_plan("parallel.pp=2")
    late = replace(times(plan), phase=lambda rank, phase: 80 * MS * (rank == 1 and phase == "update"))
    profile = recorded(plan, *[late] * 4)
    whole = max(rank.steps[-1].marks[-1] for rank in profile.ranks) - profile.ranks[0].steps[0].marks[0]
    assert Analysis(profile).account.step_seconds == pytest.approx(whole / 4 / 1e9, rel=0.02)


@pytest.mark.parametrize(
    ("late", "who"),
    [({1}, "rank 1"), ({0, 2}, "ranks 0, 2"), ({0, 1, 2, 3}, "all ranks")],
    ids=["one", "two", "all"],
)
def test_late_data_loaders_are_named(late: set[int], who: str) -> None:
    plan = make_plan("parallel.pp=4", *LARGE)
    slow = replace(times(plan), data=lambda rank: 90 * MS * (rank in late))
    (fault,) = Analysis(recorded(plan, *[slow] * 2)).faults
    assert fault.name.startswith(f"the data loader of {who}") and "90 ms late" in fault.name
