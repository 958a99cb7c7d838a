"""The critical path of steps that are known, and of any step: from 0 to its end without a gap, whatever the clocks say."""

from __future__ import annotations

from random import Random

import pytest
from recorded import LLAMA, MS, RankClock, Times, make_plan, random_times, recorded
from test_profile_timeline import LAYOUTS, ONE_MICROBATCH, timeline_of

from lime_dist.plan.operations import Operation
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.critical_path import Segment, critical_path
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import read_timelines

Told = list[tuple[str, int, float]]  # kind, rank, ms


def path_of(profile: Profile) -> tuple[Segment, ...]:
    return critical_path(timeline_of(profile))


def told(profile: Profile) -> Told:
    return [(each.kind, each.rank, round(1e3 * each.seconds, 6)) for each in path_of(profile)]


def test_over_two_stages_and_back() -> None:
    """One microbatch: all that is done, one thing after another."""
    plan = make_plan("parallel.pp=2", LLAMA, *ONE_MICROBATCH)
    ns = {Kind.FORWARD: 10 * MS, Kind.BACKWARD: 20 * MS}
    times = Times(
        run=lambda rank, operation: ns[operation.action.kind],
        link=lambda sender, receiver, message: (1 + 2 * sender) * MS,
        data=lambda rank: 4 * MS,
        phase=lambda rank, phase: 5 * MS if phase == "update" else 0,
    )
    profile = recorded(plan, times)
    assert told(profile) == [
        ("host", 0, 4),
        ("compute", 0, 10),
        ("message", 1, 1),
        ("compute", 1, 10),
        ("compute", 1, 20),
        ("message", 0, 3),
        ("compute", 0, 20),
        ("host", 0, 5),
    ]
    texts = [segment.text for segment in path_of(profile)]
    assert texts[0] == "data" and texts[-1] == "update"
    assert texts[1] == "forward of microbatch 0 through chunk 0"
    assert texts[2] == "residual of microbatch 0 over 0>1"
    assert texts[5] == "gradient of residual of microbatch 0 over 1>0"
    assert [segment.boundary for segment in path_of(profile)] == [None, None, 0, None, None, 0, None, None]
    assert [segment.stage for segment in path_of(profile)] == [segment.rank for segment in path_of(profile)]


def test_a_message_had_to_let_the_one_before_it_go_first() -> None:
    """GPipe: forwards of 1 ms over a link of 10 ms: the link is what the step waits for, three times over."""
    plan = make_plan("parallel.pp=2", LLAMA, "pipeline.num_microbatches=4", "pipeline.schedule=gpipe")
    times = Times(
        run=lambda rank, operation: MS, link=lambda sender, receiver, message: 0 if message.is_gradient else 10 * MS
    )
    path = path_of(recorded(plan, times))
    messages = [segment for segment in path if segment.kind == "message"]
    assert [segment.text for segment in messages] == [f"residual of microbatch {index} over 0>1" for index in range(4)]
    assert [round(1e3 * segment.seconds, 6) for segment in messages] == [10] * 4
    assert told(recorded(plan, times))[0] == ("compute", 0, 1), "and before them only the first forward"


def test_a_receive_that_is_posted_late_leads_to_what_the_receiver_did() -> None:
    """The first message lies ready at 1 ms; the second stage, which loads its data for 50 ms, posts its receive behind that."""
    plan = make_plan("parallel.pp=2", LLAMA, *ONE_MICROBATCH)
    times = Times(
        run=lambda rank, operation: MS, link=lambda *way: 2 * MS, data=lambda rank: 50 * MS if rank == 1 else 0
    )
    assert told(recorded(plan, times))[:3] == [("host", 1, 50), ("message", 1, 2), ("compute", 1, 1)]


def test_the_rank_that_came_last_to_a_collective() -> None:
    """Of a tensor group, whose ranks are late in turn."""

    def run(rank: int, operation: Operation) -> int:
        is_late = operation.action.microbatch_index % 2 == rank
        return (30 if is_late else 10) * MS

    plan = make_plan("parallel.tp=2", "pipeline.num_microbatches=2", "pipeline.schedule=gpipe")
    profile = recorded(plan, Times(run=run, tensor=lambda: 2 * MS))
    path = path_of(profile)
    computing = [(segment.rank, round(1e3 * segment.seconds, 6)) for segment in path if segment.kind == "compute"]
    assert computing == [(0, 30), (1, 30), (0, 30), (1, 30)]
    assert [round(1e3 * segment.seconds, 6) for segment in path if segment.kind == "collective"] == [2] * 4


def test_the_agreement_leads_to_the_rank_that_all_wait_for() -> None:
    """A replica whose norm takes 40 ms; the other one, whose record of the step takes longest, ends the step."""
    ns = {(0, "norm"): 40 * MS, (1, "record"): 7 * MS}
    times = Times(phase=lambda rank, phase: ns.get((rank, phase), 0), others=lambda: MS)
    path = told(recorded(make_plan("parallel.dp=2", *ONE_MICROBATCH), times))
    assert path[-4:] == [("host", 0, 40), ("collective", 1, 1), ("collective", 1, 1), ("host", 1, 7)]


def test_a_rank_that_begins_late_was_still_in_the_step_before() -> None:
    plan = make_plan("parallel.pp=2", LLAMA, *ONE_MICROBATCH)
    first = Times(phase=lambda rank, phase: 100 * MS if (rank, phase) == (0, "record") else 0)
    _, second = map(critical_path, read_timelines(recorded(plan, first, Times())))
    assert (second[0].kind, second[0].rank, round(1e3 * second[0].seconds, 6)) == ("wait", 0, 100)


@pytest.mark.parametrize("errs", [False, True], ids=["", "clocks err"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_has_no_gaps(layout: str, errs: bool) -> None:
    """Clocks that err by more than a pass takes make messages arrive before they leave: no circle, no gap."""
    for seed in range(6):
        random = Random(f"{layout} {seed}")
        plan = make_plan(*(f"parallel.{word}" for word in layout.split()))
        clocks = {
            rank: RankClock(wrong=random.randrange(-40 * MS, 40 * MS))
            for rank in range(1, plan.layout.world_size if errs else 1)
        }
        for timeline in read_timelines(recorded(plan, random_times(random), random_times(random), clocks=clocks)):
            path = critical_path(timeline)
            assert path[0].begin == 0.0
            assert path[-1].end == timeline.seconds
            assert all(one.end == following.begin for one, following in zip(path, path[1:]))
            assert all(segment.seconds > 0 for segment in path)
            assert sum(segment.seconds for segment in path) == pytest.approx(timeline.seconds)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_on_it_could_have_been_done_later(layout: str) -> None:
    """With true clocks a step has no slack along its path: computing and messages lie where they were recorded."""
    random = Random(layout)
    plan = make_plan(*(f"parallel.{word}" for word in layout.split()))
    timeline = timeline_of(recorded(plan, random_times(random)))
    for segment in critical_path(timeline):
        if segment.kind in ("compute", "host"):
            middle = (segment.begin + segment.end) / 2
            (piece,) = (each for each in timeline.pieces[segment.rank] if each.begin <= middle < each.end)
            assert piece.delivery is None and piece.collective is None, (
                "a wait has a reason, and is on the path with it"
            )
