"""Where a step's time goes: known steps piece by piece, and, over random ones under many layouts, that nothing is lost."""

from __future__ import annotations

from collections import defaultdict
from math import fsum
from random import Random

import pytest
from recorded import LLAMA, MS, RankClock, Times, make_plan, random_times, recorded

from lime_dist.plan.operations import Verb
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.accounting import Account, account
from lime_dist.profiling.deliveries import ALONE
from lime_dist.profiling.profile_files import MeasuredLink, Profile
from lime_dist.profiling.timeline import Cause, Piece, StepTimeline, read_timelines

TWO_STAGES = ("parallel.pp=2", LLAMA)
ONE_MICROBATCH = ("pipeline.num_microbatches=1", "pipeline.schedule=gpipe")
LAYOUTS = [
    "pp=1", "pp=2", "pp=3", "pp=4", "pp=1 tp=2", "pp=2 tp=2", "pp=3 tp=2", "pp=1 dp=2", "pp=3 dp=2", "pp=2 tp=2 dp=2",
    "pp=2 virtual_stages=2", "pp=4 virtual_stages=2", "pp=2 virtual_stages=2 tp=2",
]  # fmt: skip


def timeline_of(profile: Profile) -> StepTimeline:
    (timeline,) = read_timelines(profile)
    return timeline


def account_of(profile: Profile) -> Account:
    return account(profile, list(read_timelines(profile)))


def spent(pieces: tuple[Piece, ...]) -> dict[Cause, float]:
    """In ms, but for causes without any."""
    seconds: dict[Cause, float] = defaultdict(float)
    for piece in pieces:
        seconds[piece.cause] += piece.seconds
    return {cause: round(1e3 * total, 6) for cause, total in seconds.items()}


def ms(profile: Profile, rank: int) -> dict[Cause, float]:
    return spent(timeline_of(profile).pieces[rank])


# ---- messages


def test_a_late_sender_on_a_fast_link_is_a_dependency() -> None:
    """Two stages, one microbatch: each waits while the other computes."""
    profile = recorded(make_plan(*TWO_STAGES, *ONE_MICROBATCH))
    assert ms(profile, 0) == {Cause.COMPUTE: 20, Cause.DEPENDENCY: 20}
    assert ms(profile, 1) == {Cause.COMPUTE: 20, Cause.DEPENDENCY: 20}


@pytest.mark.parametrize(
    "overrides", [(), ("pipeline.warmup=3",), ("pipeline.schedule=gpipe",), ("parallel.virtual_stages=2",)]
)
@pytest.mark.parametrize("seed", range(5))
def test_infinitely_fast_links_are_never_waited_for(overrides: tuple[str, ...], seed: int) -> None:
    """However long each pass takes, also where the receiver posts long after the last message was handed over."""
    random = Random(seed)
    plan = make_plan("parallel.pp=2", "pipeline.num_microbatches=8", *overrides)
    profile = recorded(plan, Times(run=lambda rank, operation: random.randrange(20 * MS)))
    found = account_of(profile)
    assert found.share_of(Cause.TRANSFER, Cause.QUEUE) == 0
    assert found.share_of(Cause.DEPENDENCY) > 0
    assert all(each.exposed == each.busy == 0 and each.hidden_share == 1 for each in found.boundaries)


def test_a_punctual_sender_on_a_slow_link_is_transfer() -> None:
    profile = recorded(make_plan(*TWO_STAGES, *ONE_MICROBATCH), Times(link=lambda *way: 7 * MS))
    assert ms(profile, 0) == {Cause.COMPUTE: 20, Cause.DEPENDENCY: 27, Cause.TRANSFER: 7}
    assert ms(profile, 1) == {Cause.COMPUTE: 20, Cause.DEPENDENCY: 10 + 10, Cause.TRANSFER: 7 + 7}, (
        "the last gradient leaves, too"
    )
    (forward, backward) = account_of(profile).boundaries
    assert (forward.name, forward.direction, backward.name, backward.direction) == ("0>1", "forward", "1>0", "backward")
    for each in (forward, backward):
        assert (each.busy, each.transfer, each.exposed) == pytest.approx((0.007, 0.007, 0.007))
        assert each.hidden_share == pytest.approx(0.0, abs=1e-9)
        assert each.sent_bytes == each.planned_bytes > 0
        assert each.bytes_per_second == pytest.approx(each.sent_bytes / 0.007)


def test_a_wait_begins_when_the_message_before_is_taken() -> None:
    """GPipe, two forwards of 1 ms over a link of 10 ms: the second is handed over at 2 and goes from 11 to 21, needed at 12.

    So of the queue of a channel nobody waits for more: messages are needed in the order in which they leave.
    """
    plan = make_plan(*TWO_STAGES, "pipeline.num_microbatches=2", "pipeline.schedule=gpipe")
    times = Times(
        run=lambda rank, operation: MS,
        link=lambda sender, receiver, message: 0 if message.is_gradient else 10 * MS,
    )
    pieces = timeline_of(recorded(plan, times)).pieces[1]
    waits = [
        (piece.cause, round(1e3 * piece.begin, 6), round(1e3 * piece.end, 6)) for piece in pieces if piece.delivery
    ]
    assert waits == [(Cause.DEPENDENCY, 0, 1), (Cause.TRANSFER, 1, 11), (Cause.TRANSFER, 12, 21)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_messages_are_awaited_in_the_order_of_their_channel(layout: str) -> None:
    plan = make_plan(*(f"parallel.{word}" for word in layout.split()))
    for stage in plan.stages:
        operations = list(stage.operations(stage.actions))
        for kind in Kind:
            posted, awaited = (
                [(each.action, each.message) for each in operations if each.verb is verb and each.action.kind is kind]
                for verb in (Verb.RECEIVE, Verb.AWAIT)
            )
            assert posted == awaited


def test_what_takes_longer_beside_another_channel_is_queue() -> None:
    """A middle stage's card: gradients to the one before and activations to the next, at the same time."""
    plan = make_plan("parallel.pp=3", LLAMA, "pipeline.num_microbatches=8")

    def link(*way: object) -> float:
        return 25 * MS

    found = timeline_of(recorded(plan, Times(link=link))).deliveries
    alone = [delivery for delivery in found if delivery.quiet >= ALONE]
    beside = [delivery for delivery in found if delivery.quiet < ALONE]
    assert alone and beside
    assert all(delivery.transfer_seconds == pytest.approx(0.025) for delivery in alone)
    assert all(delivery.transfer_seconds <= 0.025 + 1e-9 for delivery in beside)


def test_a_receive_posted_early_is_not_a_wait() -> None:
    """The first stage posts its gradients' receives ahead: it waits from when it has nothing left to compute."""
    plan = make_plan(*TWO_STAGES, "pipeline.num_microbatches=2", "pipeline.schedule=gpipe", "pipeline.receives_ahead=4")
    run = {0: MS, 1: 10 * MS}
    profile = recorded(plan, Times(run=lambda rank, operation: run[rank]))
    timeline = timeline_of(profile)
    gradients = [delivery for delivery in timeline.deliveries if delivery.action.kind is Kind.BACKWARD]
    assert all(delivery.posted == 0 and delivery.needed >= 0.002 for delivery in gradients)
    assert ms(profile, 0) == {Cause.COMPUTE: 4, Cause.DEPENDENCY: 38}
    waits = [piece for piece in timeline.pieces[0] if piece.delivery]
    assert waits[0].begin == pytest.approx(0.002), "the wait begins behind the forwards"


def test_a_message_that_is_there_when_it_is_needed_is_hidden() -> None:
    """The second stage computes for long: what arrives meanwhile costs nothing."""
    plan = make_plan(*TWO_STAGES, "pipeline.num_microbatches=4", "pipeline.schedule=gpipe", "pipeline.receives_ahead=8")
    run = {0: MS, 1: 50 * MS}
    profile = recorded(plan, Times(run=lambda rank, operation: run[rank], link=lambda *way: 2 * MS))
    forward = account_of(profile).boundaries[0]
    assert forward.busy == pytest.approx(0.008)
    assert forward.exposed == pytest.approx(0.002), "of the first alone"
    assert forward.exposed_by == {"residual": pytest.approx(0.002)}
    assert forward.hidden_share == pytest.approx(0.75)


def test_taking_in_and_sending_is_the_hosts() -> None:
    profile = recorded(make_plan(*TWO_STAGES, *ONE_MICROBATCH), Times(host=lambda: MS))
    assert ms(profile, 0)[Cause.HOST] == 3  # a send, a receive posted, a message taken in
    assert ms(profile, 1)[Cause.HOST] == 3


def test_flushing_waits_for_the_link() -> None:
    """The last gradient takes 7 ms to leave; its receiver is there."""
    plan = make_plan(*TWO_STAGES, *ONE_MICROBATCH)
    pieces = timeline_of(recorded(plan, Times(link=lambda *way: 7 * MS))).pieces[1]
    assert [piece.cause for piece in pieces if piece.about == "flush"] == [Cause.TRANSFER]
    assert spent(tuple(piece for piece in pieces if piece.about == "flush")) == {Cause.TRANSFER: 7}


# ---- the rest of a step


def test_data_phases_and_what_follows() -> None:
    lengths = {"flush": 0, "gradients": 1, "norm": 2, "agreement": 3, "update": 4, "record": 5}
    times = Times(data=lambda rank: 6 * MS, phase=lambda rank, phase: lengths[phase] * MS)
    assert ms(recorded(make_plan(), times), 0) == {
        Cause.COMPUTE: 80,
        Cause.DATA: 6,
        Cause.HOST: 1 + 3 + 5,
        Cause.OPTIMIZER: 2 + 4,
    }


def test_collectives_of_a_tensor_group_are_its_own_from_end_to_end() -> None:
    """Rank 1 is late by 5 ms at each of 8 passes; the collective takes 2 ms."""
    run = {0: 10 * MS, 1: 15 * MS}
    profile = recorded(make_plan("parallel.tp=2"), Times(run=lambda rank, operation: run[rank], tensor=lambda: 2 * MS))
    assert ms(profile, 0) == {Cause.COMPUTE: 80, Cause.TENSOR: 8 * 7}
    assert ms(profile, 1) == {Cause.COMPUTE: 120, Cause.TENSOR: 8 * 2}
    waits = [piece for piece in timeline_of(profile).pieces[0] if piece.collective]
    assert all(piece.collective.last_rank == 1 for piece in waits if piece.collective)
    late = [piece.collective.late_seconds for piece in waits if piece.collective]
    assert late == pytest.approx([0.005] * 16)  # each in two pieces: the wait for rank 1, and the collective itself


def test_replicas_wait_for_each_other_by_cause() -> None:
    late = {(1, "gradients"): 20 * MS}
    times = Times(phase=lambda rank, phase: late.get((rank, phase), 0), others=lambda: MS)
    profile = recorded(make_plan("parallel.dp=2"), times)
    assert ms(profile, 0) == {Cause.COMPUTE: 80, Cause.DATA_PARALLEL: 22}  # the agreement of dp=2 is of replicas alone
    assert ms(profile, 1) == {Cause.COMPUTE: 80, Cause.HOST: 20, Cause.DATA_PARALLEL: 2}


def test_waiting_for_other_stages_in_a_collective_is_a_dependency() -> None:
    """Behind the passes stage 0 takes 20 ms more: in the embedding's sum both ends wait for it, in the agreement all do."""
    late = {(0, "flush"): 20 * MS}
    times = Times(phase=lambda rank, phase: late.get((rank, phase), 0), others=lambda: 3 * MS)
    profile = recorded(make_plan("parallel.pp=3", LLAMA, *ONE_MICROBATCH), times)
    pieces = timeline_of(profile).pieces
    for rank in (0, 2):
        assert spent(tuple(piece for piece in pieces[rank] if piece.about == "gradients")).get(Cause.EMBEDDING) == 3
    assert not any(piece.about == "gradients" for piece in pieces[1])
    # The last stage ends its backward 20 ms before the first one ends its own, which then takes 20 ms more.
    of_last = spent(tuple(piece for piece in pieces[2] if piece.about == "gradients"))
    assert of_last == {Cause.DEPENDENCY: 40, Cause.EMBEDDING: 3}
    of_middle = spent(tuple(piece for piece in pieces[1] if piece.about == "agreement"))
    assert of_middle == {Cause.DEPENDENCY: 10 + 20 + 3, Cause.AGREEMENT: 3}


# ---- clocks


def test_clocks_that_are_known_change_nothing() -> None:
    """Hours apart, and drifting by 100 us a second."""
    plan, times = make_plan("parallel.pp=3"), Times(link=lambda *way: 3 * MS)
    clocks = {1: RankClock(ahead=7_200 * 10**9, drift=1e-4), 2: RankClock(ahead=-(10**9), drift=-1e-4)}
    expected = timeline_of(recorded(plan, times))
    actual = timeline_of(recorded(plan, times, clocks=clocks))
    assert actual.seconds == pytest.approx(expected.seconds, abs=1e-7)
    for rank, pieces in expected.pieces.items():
        found = {cause: pytest.approx(each, abs=1e-3) for cause, each in spent(pieces).items()}
        shown = spent(tuple(piece for piece in actual.pieces[rank] if piece.seconds > 1e-7))
        assert shown == found


def test_steps_are_apart() -> None:
    """The second step is slower, and is told by itself; the account is of the mean."""
    plan = make_plan("parallel.pp=2")
    profile = recorded(plan, Times(), Times(run=lambda rank, operation: 30 * MS))
    fast, slow = read_timelines(profile)
    assert (fast.step, slow.step) == (1, 2)
    assert slow.seconds == pytest.approx(3 * fast.seconds)
    assert account_of(profile).step_seconds == pytest.approx(2 * fast.seconds)


# ---- any step


@pytest.mark.parametrize("errs", [False, True], ids=["", "clocks err"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_follow_each_other_without_a_gap(layout: str, errs: bool) -> None:
    """So that they sum to the step exactly. Clocks may be known badly: the rank's own pieces are then still whole."""
    for seed in range(4):
        random = Random(f"{layout} {seed}")
        plan = make_plan(*(f"parallel.{word}" for word in layout.split()))
        clocks = {
            rank: RankClock(ahead=random.randrange(10**12), drift=random.uniform(-1e-4, 1e-4), wrong=random.randrange(-5 * MS, 5 * MS))
            for rank in range(1, plan.layout.world_size if errs else 1)
        }  # fmt: skip
        profile = recorded(plan, random_times(random), random_times(random), clocks=clocks)
        for index, timeline in enumerate(read_timelines(profile)):
            for record in profile.ranks:
                marks, pieces = record.steps[index].marks, timeline.pieces[record.rank]
                assert all(one.end == following.begin for one, following in zip(pieces, pieces[1:]))
                assert all(piece.seconds > 0 for piece in pieces)
                step = (record.on_first_clock(marks[-1]) - record.on_first_clock(marks[0])) / 1e9
                assert pieces[-1].end - pieces[0].begin == pytest.approx(step, abs=1e-12)
                assert fsum(piece.seconds for piece in pieces) == pytest.approx(step, abs=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accounts_sum_to_the_step_and_carry_what_is_planned(layout: str) -> None:
    random = Random(layout)
    plan = make_plan(*(f"parallel.{word}" for word in layout.split()))
    profile = recorded(plan, random_times(random), random_times(random))
    found = account_of(profile)
    for rank in found.ranks:
        assert sum(rank.seconds.values()) == pytest.approx(rank.step_seconds, abs=1e-12)
    assert sum(found.share_of(cause) for cause in Cause) == pytest.approx(1)
    assert [each.sent_bytes for each in found.boundaries] == [each.planned_bytes for each in found.boundaries]
    planned = [plan.num_microbatches * count for count in plan.boundary_bytes]
    ways = [*plan.boundary_bytes]
    assert [each.planned_bytes for each in found.boundaries] == planned * 2, "as many bytes come back"
    assert len(found.boundaries) == 2 * len(ways)
    deliveries = [each for timeline in read_timelines(profile) for each in timeline.deliveries]
    means = 2 * plan.layout.tp * plan.layout.dp  # two steps, of pairs of ranks
    spans, alone = (
        sum(each.arrived - each.started for each in deliveries) / means,
        sum(each.transfer_seconds for each in deliveries) / means,
    )
    assert sum(each.busy for each in found.boundaries) == pytest.approx(spans)
    assert sum(each.transfer for each in found.boundaries) == pytest.approx(alone)
    # What ranks waited for links is what boundaries were exposed: the same moments, told by rank and by message.
    waited = sum(rank.seconds[Cause.QUEUE] + rank.seconds[Cause.TRANSFER] for rank in found.ranks)
    flushed = sum(
        piece.seconds / 2
        for timeline in read_timelines(profile)
        for pieces in timeline.pieces.values()
        for piece in pieces
        if piece.about == "flush" and piece.cause is Cause.TRANSFER
    )
    pairs = plan.layout.tp * plan.layout.dp
    assert waited - flushed == pytest.approx(pairs * sum(each.exposed for each in found.boundaries), abs=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deliveries_are_the_plans_messages(layout: str) -> None:
    """Each once a microbatch, between neighbours, from a SEND that has ended to the AWAIT that takes it."""
    plan = make_plan(*(f"parallel.{word}" for word in layout.split()))
    profile = recorded(plan, random_times(Random(layout)))
    timeline = timeline_of(profile)
    expected = [
        (operation.action, operation.message)
        for stage in plan.stages
        for operation in stage.operations(stage.actions)
        if operation.verb is Verb.AWAIT
    ]
    pairs = plan.layout.tp * plan.layout.dp
    assert len(timeline.deliveries) == pairs * len(expected)
    for delivery in timeline.deliveries:
        message = delivery.message
        assert (delivery.action, message) in expected
        assert plan.layout.coordinate(delivery.sender).pp_rank == message.from_chunk % plan.layout.pp
        assert plan.layout.coordinate(delivery.receiver).pp_rank == message.to_chunk % plan.layout.pp
        assert delivery.ready <= delivery.handed <= delivery.started <= delivery.arrived <= delivery.taken
        assert delivery.posted <= delivery.needed <= delivery.taken


def test_each_link_has_what_it_carried_alone_before() -> None:
    links = [MeasuredLink(from_stage=1, to_stage=0, bytes_per_second=5.0)]
    forward, backward = account_of(recorded(make_plan(*TWO_STAGES), links=links)).boundaries
    assert (forward.measured, backward.measured) == (None, links[0])
