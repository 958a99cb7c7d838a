"""What every rank did from the beginning of a step to its end, piece by piece, each with its cause. Pure data.

A rank's pieces follow each other without a gap, so that those of all causes sum to its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, cached_property
from typing import NamedTuple

from lime_dist.layout import Layout
from lime_dist.pipeline.step_times import PHASES, CollectiveTimes
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.deliveries import Channel, Delivery, Received, Sent, deliver, times_alone, told_apart
from lime_dist.profiling.profile_files import Profile, RankRecord


class Cause(Enum):
    """What a rank's time goes into; all but the first keep it from computing."""

    COMPUTE = "compute"
    DEPENDENCY = "dependency"  # another stage had not computed yet what it waits for: the bubble
    QUEUE = "queue"  # the link was carrying other messages
    TRANSFER = "transfer"  # the link was carrying what it waits for
    TENSOR = "tp"  # collectives of tensor parallelism
    DATA_PARALLEL = "dp"  # the sum over replicas, and ZeRO's
    EMBEDDING = "embedding"  # the sum over both ends of a tied embedding
    AGREEMENT = "agreement"  # the norm, and what all ranks tell each other
    OPTIMIZER = "optimizer"
    DATA = "data"
    HOST = "host"  # posting, sending, taking in; records


LINK = (Cause.QUEUE, Cause.TRANSFER)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One rank's part in a collective. last_rank: the global rank that came last, at `complete`; before, nobody could go on."""

    ranks: tuple[int, ...]
    cause: Cause
    entered: float
    wait_begun: float
    wait_ended: float
    last_rank: int
    complete: float

    @property
    def late_seconds(self) -> float:
        """For which this rank waited for one that came later."""
        return max(0.0, min(self.complete, self.wait_ended) - self.wait_begun)


class Piece(NamedTuple):
    """about: an operation or one of `PHASES` or "data"; delivery, collective: what was waited for, where it was one of these."""

    begin: float
    end: float
    cause: Cause
    about: Operation | str
    delivery: Delivery | None = None
    collective: Collective | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True)
class StepTimeline:
    """One step of all ranks, in seconds since the first of them began it."""

    step: int
    layout: Layout
    pieces: Mapping[int, tuple[Piece, ...]]  # by global rank
    deliveries: tuple[Delivery, ...]

    @property
    def seconds(self) -> float:
        return max(pieces[-1].end for pieces in self.pieces.values())

    def begin_of(self, rank: int) -> float:
        return self.pieces[rank][0].begin

    def stage_of(self, rank: int) -> int:
        return self.layout.coordinate(rank).pp_rank


def read_timelines(profile: Profile) -> Iterator[StepTimeline]:
    """Of each recorded step."""
    steps = [_Step(profile, index) for index in range(len(profile.steps))]
    alone = times_alone(delivery for step in steps for delivery in step.deliveries.values())
    for step in steps:
        yield step.timeline(alone)


def step_origin(profile: Profile, index: int) -> float:
    """When the first rank began the recorded step of this index, in ns of rank 0's clock: where its timeline is at 0."""
    return min(record.on_first_clock(record.steps[index].marks[0]) for record in profile.ranks)


@dataclass
class _RankStep:
    """One rank's record of a step, in seconds since it began. ends: of the data, of each operation, of each phase."""

    record: RankRecord
    begin: float
    ends: list[float]
    arrivals: list[float]
    collectives: list[Collective]


class _Step:
    def __init__(self, profile: Profile, index: int):
        self._profile, self._plan, self._index = profile, profile.plan, index
        self._origin = step_origin(profile, index)
        self._operations = [_operations(self._plan, stage) for stage in range(len(self._plan.stages))]

    @cached_property
    def _ranks(self) -> list[_RankStep]:
        collectives = self._collectives()
        return [self._rank_step(record, collectives[record.rank]) for record in self._profile.ranks]

    @cached_property
    def deliveries(self) -> dict[tuple[int, int], Delivery]:
        return deliver(self._channels(self._ranks))

    def timeline(self, alone: Mapping[tuple[int, int, int], float]) -> StepTimeline:
        """alone: see `times_alone`."""
        ranks = self._ranks
        deliveries = {place: told_apart(delivery, alone) for place, delivery in self.deliveries.items()}
        sent: dict[int, list[Delivery]] = {step.record.rank: [] for step in ranks}
        for delivery in deliveries.values():
            sent[delivery.sender].append(delivery)
        pieces = {
            rank: tuple(self._pieces(step, deliveries, sent[rank])) for step in ranks for rank in [step.record.rank]
        }
        return StepTimeline(
            step=self._profile.steps[self._index],
            layout=self._plan.layout,
            pieces=pieces,
            deliveries=tuple(deliveries.values()),
        )

    def _pieces(
        self, step: _RankStep, deliveries: Mapping[tuple[int, int], Delivery], sent: Sequence[Delivery]
    ) -> Iterator[Piece]:
        operations = self._operations[self._stage(step.record.rank)]
        return _Pieces(step, operations, deliveries, sent).all_pieces()

    def _stage(self, rank: int) -> int:
        return self._plan.layout.coordinate(rank).pp_rank

    def _seconds(self, record: RankRecord, moment: int) -> float:
        return (record.on_first_clock(moment) - self._origin) / 1e9

    def _rank_step(self, record: RankRecord, collectives: list[Collective]) -> _RankStep:
        times = record.steps[self._index]
        begin, *ends = (self._seconds(record, mark) for mark in times.marks)
        arrivals = [self._seconds(record, arrival) for arrival in times.arrivals]
        return _RankStep(record, begin, ends, arrivals, collectives)

    # ---- collectives

    def _collectives(self) -> dict[int, list[Collective]]:
        """By rank. The k-th of a group on one rank is the k-th on all of its ranks."""
        entered: dict[tuple[str, int], list[tuple[float, int]]] = {}
        own: dict[int, list[tuple[CollectiveTimes, tuple[str, int]]]] = {}
        for record in self._profile.ranks:
            counts: dict[str, int] = {}
            own[record.rank] = []
            for times in record.steps[self._index].collectives:
                key = times.group_name, counts.get(times.group_name, 0)
                counts[times.group_name] = key[1] + 1
                entered.setdefault(key, []).append((self._seconds(record, times.entered), record.rank))
                own[record.rank].append((times, key))
        return {
            record.rank: [self._collective(record, times, max(entered[key])) for times, key in own[record.rank]]
            for record in self._profile.ranks
        }

    def _collective(self, record: RankRecord, times: CollectiveTimes, last: tuple[float, int]) -> Collective:
        ranks = record.group_ranks[times.group_name]
        return Collective(
            ranks=ranks,
            cause=_cause_of_group(self._plan.layout, ranks),
            entered=self._seconds(record, times.entered),
            wait_begun=self._seconds(record, times.wait_begun),
            wait_ended=self._seconds(record, times.wait_ended),
            last_rank=last[1],
            complete=last[0],
        )

    # ---- messages

    def _channels(self, ranks: Sequence[_RankStep]) -> Iterator[Channel]:
        for sender in ranks:
            for kind in Kind:
                receiver, boundary = _neighbour(self._plan, sender.record.rank, kind)
                sent = self._sent(sender, kind)
                if sent:
                    yield Channel(
                        sender=sender.record.rank,
                        receiver=receiver,
                        boundary=boundary,
                        sent=sent,
                        received=self._received(ranks[receiver], kind),
                    )

    def _sent(self, step: _RankStep, kind: Kind) -> list[Sent]:
        operations = self._operations[self._stage(step.record.rank)]
        return [
            Sent(message=operation.message, ready=step.ends[place], handed=step.ends[place + 1])
            for place, operation in enumerate(operations)
            if operation.verb is Verb.SEND and operation.action.kind is kind and operation.message is not None
        ]

    def _received(self, step: _RankStep, kind: Kind) -> list[Received]:
        """In the order posted."""
        operations = self._operations[self._stage(step.record.rank)]
        awaited = {
            (operation.action, operation.message): place
            for place, operation in enumerate(operations)
            if operation.verb is Verb.AWAIT
        }
        received, order = [], 0
        for place, operation in enumerate(operations):
            if operation.verb is not Verb.RECEIVE:
                continue
            if operation.action.kind is kind:
                wait = awaited[operation.action, operation.message]
                received.append(
                    Received(
                        order=wait,
                        action=operation.action,
                        posted=step.ends[place + 1],
                        arrived=step.arrivals[order],
                        needed=step.ends[wait],
                        taken=step.ends[wait + 1],
                    )
                )
            order += 1
        return received


@cache
def _cause_of_group(layout: Layout, ranks: tuple[int, ...]) -> Cause:
    """By the axes of the layout over which its ranks differ."""
    places = [layout.coordinate(rank) for rank in ranks]
    differ = {axis for axis in ("tp_rank", "dp_rank", "pp_rank") if len({getattr(place, axis) for place in places}) > 1}
    if differ == {"tp_rank"}:
        return Cause.TENSOR
    if differ == {"dp_rank"}:
        return Cause.DATA_PARALLEL
    return Cause.AGREEMENT


def _neighbour(plan: RunPlan, rank: int, kind: Kind) -> tuple[int, int]:
    """Whom a rank's messages of this kind go to, and over which boundary; with virtual stages around the ring."""
    place, num_stages = plan.layout.coordinate(rank), len(plan.stages)
    to = (place.pp_rank + (1 if kind is Kind.FORWARD else -1)) % num_stages
    boundary = place.pp_rank if kind is Kind.FORWARD else to
    return plan.layout.global_rank(replace(place, pp_rank=to)), boundary


def _operations(plan: RunPlan, stage_index: int) -> tuple[Operation, ...]:
    stage = plan.stages[stage_index]
    return tuple(stage.operations(stage.actions))


class _Pieces:
    """One rank's. sent: its own of `deliveries`."""

    def __init__(
        self,
        step: _RankStep,
        operations: Sequence[Operation],
        deliveries: Mapping[tuple[int, int], Delivery],
        sent: Sequence[Delivery],
    ):
        self._step, self._operations, self._deliveries, self._sent = step, operations, deliveries, sent
        self._collectives = sorted(step.collectives, key=lambda each: each.wait_begun)
        self._next_collective = 0

    def all_pieces(self) -> Iterator[Piece]:
        """In order, of more than no time."""
        for piece in self._pieces():
            if piece.end > piece.begin:
                yield piece

    def _pieces(self) -> Iterator[Piece]:
        data, *ends = self._step.ends
        yield Piece(self._step.begin, data, Cause.DATA, "data")
        begin = data
        for place, operation in enumerate(self._operations):
            yield from self._operation(operation, place, begin, ends[place])
            begin = ends[place]
        for phase, end in zip(PHASES, ends[len(self._operations) :], strict=True):
            if phase == "flush":
                yield from _flushing(self._sent, begin, end)
            else:
                yield from self._with_collectives(begin, end, _CAUSES[phase], phase)
            begin = end

    def _operation(self, operation: Operation, place: int, begin: float, end: float) -> Iterator[Piece]:
        if operation.verb is Verb.AWAIT:
            yield from _waiting(self._deliveries[self._step.record.rank, place], operation, begin, end)
        elif operation.verb is Verb.RUN:
            yield from self._with_collectives(begin, end, Cause.COMPUTE, operation)
        else:
            yield Piece(begin, end, Cause.HOST, operation)

    def _with_collectives(self, begin: float, end: float, cause: Cause, about: Operation | str) -> Iterator[Piece]:
        """What is done from `begin` to `end`, but for the waits in collectives."""
        while self._next_collective < len(self._collectives):
            collective = self._collectives[self._next_collective]
            if collective.wait_begun >= end:
                break
            self._next_collective += 1
            if collective.wait_ended <= begin:
                continue
            wait_begun, wait_ended = max(begin, collective.wait_begun), min(end, collective.wait_ended)
            yield Piece(begin, wait_begun, cause, about)
            yield from _in_collective(collective, wait_begun, wait_ended, about)
            begin = wait_ended
        yield Piece(begin, end, cause, about)


_CAUSES = {
    "gradients": Cause.HOST,
    "norm": Cause.OPTIMIZER,
    "agreement": Cause.HOST,
    "update": Cause.OPTIMIZER,
    "record": Cause.HOST,
}


_TICK = 1e-9  # of the ranks' clocks, in seconds


def _waiting(delivery: Delivery, operation: Operation, begin: float, end: float) -> Iterator[Piece]:
    """For a message: until it is handed over for its sender, then for the link, then what taking it in costs."""
    arrived = min(max(delivery.arrived, begin), end)
    handed = min(max(delivery.handed, begin), arrived)
    carried = max(handed, arrived - delivery.transfer_behind(handed))
    if carried - handed < _TICK:  # what adding up the shares has lost
        carried = handed
    for one, following, cause in (
        (begin, handed, Cause.DEPENDENCY),
        (handed, carried, Cause.QUEUE),
        (carried, arrived, Cause.TRANSFER),
    ):
        yield Piece(one, following, cause, operation, delivery=delivery)
    yield Piece(arrived, end, Cause.HOST, operation)


def _flushing(sent: Sequence[Delivery], begin: float, end: float) -> Iterator[Piece]:
    """Until the last message has left: while its receiver computes and has not posted it yet, nothing is on the link."""
    last = max(sent, key=lambda delivery: delivery.arrived, default=None)
    if last is None or last.arrived <= begin:
        yield Piece(begin, end, Cause.HOST, "flush")
        return
    posted = min(max(last.posted, begin), end)
    yield Piece(begin, posted, Cause.DEPENDENCY, "flush", delivery=last)
    yield Piece(posted, end, Cause.TRANSFER, "flush", delivery=last)


def _in_collective(collective: Collective, begin: float, end: float, about: Operation | str) -> Iterator[Piece]:
    """Where stages meet, waiting for the last of them is the end of the bubble."""
    complete, own = min(max(collective.complete, begin), end), collective.cause
    late = Cause.DEPENDENCY if own is Cause.AGREEMENT else own
    own = Cause.EMBEDDING if own is Cause.AGREEMENT and about == "gradients" else own
    yield Piece(begin, complete, late, about, collective=collective)
    yield Piece(complete, end, own, about, collective=collective)
