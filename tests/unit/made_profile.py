"""A profile as ranks would have recorded it, of made-up times: each operation takes its turn on clocks that do not agree."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from lime_dist.config import Config
from lime_dist.layout import Layout
from lime_dist.pipeline.step_times import PHASES, CollectiveTimes, StepTimes
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.profile_files import Profile, RankRecord, read_profile, write_head, write_rank

WORLD, TENSOR = "world", "tensor"  # groups
_MEAN_NS = {Verb.RECEIVE: 2_000, Verb.AWAIT: 5_000, Verb.RUN: 900_000, Verb.SEND: 20_000}
_TRANSFER_NS = (300_000, 300_000, 300_000, 2_000)  # at most; the last is there before its send returns
_AHEAD_NS, _DRIFT = 40_000_000, 2e-5  # of each rank's clock before the one of the rank before it


@dataclass
class _Rank:
    """One rank in one step, on the true clock."""

    operations: tuple[Operation, ...]
    now: int
    place: int = 0
    marks: list[int] = field(default_factory=list)
    posted: list[tuple[Operation, int]] = field(default_factory=list)
    collectives: list[CollectiveTimes] = field(default_factory=list)


class _Step:
    def __init__(self, plan: RunPlan, begin: int, rng: random.Random):
        self._plan, self._layout, self._rng = plan, plan.layout, rng
        self._left: dict[tuple, int] = {}  # by receiver and message
        self._free: dict[tuple[int, Kind], int] = defaultdict(int)  # channels, by receiver
        self._arrived: dict[tuple, int] = {}
        self.ranks = [
            _Rank(operations_of(plan, rank), begin + rng.randrange(50_000)) for rank in range(plan.layout.world_size)
        ]

    def run(self) -> None:
        for rank in self.ranks:
            rank.marks = [rank.now]
            self._spend(rank, 30_000)
        while any([self._go_on(number) for number in range(len(self.ranks))]):
            pass
        assert all(rank.place == len(rank.operations) for rank in self.ranks), "ranks wait for each other"
        for phase in PHASES:
            meeting = max(rank.now for rank in self.ranks)
            for rank in self.ranks:
                if phase == "agreement":
                    left = meeting + 40_000
                    rank.collectives.append(CollectiveTimes(WORLD, rank.now, rank.now + 1_000, left))
                    rank.now = left
                self._spend(rank, 60_000)

    def arrivals(self, number: int) -> list[int]:
        return [self._arrived[_key(number, operation)] for operation, _ in self.ranks[number].posted]

    def _spend(self, rank: _Rank, mean_ns: int) -> None:
        rank.now += self._rng.randrange(mean_ns // 2, mean_ns * 3 // 2)
        rank.marks.append(rank.now)

    def _go_on(self, number: int) -> bool:
        """As far as the rank comes; whether it came on at all."""
        rank, first = self.ranks[number], self.ranks[number].place
        while rank.place < len(rank.operations):
            operation = rank.operations[rank.place]
            if operation.verb is Verb.AWAIT:
                if _key(number, operation) not in self._left:
                    break
                rank.now = max(rank.now, self._arrive(number, operation))
            if operation.verb is Verb.RUN and self._layout.tp > 1:
                entered = rank.now + 10_000
                rank.collectives.append(CollectiveTimes(TENSOR, entered, entered + 500, entered + 90_000))
            if operation.verb is Verb.SEND:
                receiver = neighbour(self._layout, number, operation.action.kind)
                self._left[_key(receiver, operation)] = rank.now + 1_000
            self._spend(rank, _MEAN_NS[operation.verb])
            if operation.verb is Verb.RECEIVE:
                rank.posted.append((operation, rank.now))
            rank.place += 1
        return rank.place > first

    def _arrive(self, number: int, awaited: Operation) -> int:
        """One after the other, in the order posted."""
        kind = awaited.action.kind
        for operation, posted in self.ranks[number].posted:
            key = _key(number, operation)
            if operation.action.kind is not kind or key in self._arrived or key not in self._left:
                continue
            started = max(posted, self._left[key], self._free[number, kind])
            self._arrived[key] = self._free[number, kind] = started + self._rng.randrange(
                self._rng.choice(_TRANSFER_NS)
            )
        return self._arrived[_key(number, awaited)]


def _key(receiver: int, operation: Operation) -> tuple:
    """The same at both ends of a message."""
    assert operation.message is not None
    return receiver, operation.message, operation.action.kind, operation.action.microbatch_index


def neighbour(layout: Layout, rank: int, kind: Kind) -> int:
    place = layout.coordinate(rank)
    step = 1 if kind is Kind.FORWARD else -1
    return layout.global_rank(replace(place, pp_rank=(place.pp_rank + step) % layout.pp))


def operations_of(plan: RunPlan, rank: int) -> tuple[Operation, ...]:
    stage = plan.stages[plan.layout.coordinate(rank).pp_rank]
    return tuple(stage.operations(stage.actions))


def make_profile(folder: Path, config: Config, num_steps: int = 2) -> Profile:
    """Written to `folder` and read from there; its steps are 3, 4, ..."""
    plan, rng = plan_run(config), random.Random(1)
    folder.mkdir(parents=True)
    steps, begin = [], 10**12
    for _ in range(num_steps):
        steps.append(_Step(plan, begin, rng))
        steps[-1].run()
        begin = max(rank.now for rank in steps[-1].ranks) + 100_000
    for rank in range(plan.layout.world_size):
        write_rank(folder, _record(plan, rank, steps))
    write_head(folder, plan, range(3, 3 + num_steps), ())
    return read_profile(folder)


def _record(plan: RunPlan, rank: int, steps: list[_Step]) -> RankRecord:
    layout = plan.layout
    place = layout.coordinate(rank)
    tensor = [layout.global_rank(replace(place, tp_rank=other)) for other in range(layout.tp)]
    return RankRecord(
        rank=rank,
        host=f"host{rank}",
        device="CPU",
        cores=8,
        threads=1,
        offsets=(_offset(rank, 10**12), _offset(rank, 10**12 + 10**10)),
        epoch_ns=1_700_000_000_000_000_000 - rank * _AHEAD_NS,
        group_ranks={WORLD: tuple(range(layout.world_size)), TENSOR: tuple(tensor)},
        steps=tuple(_times(rank, step) for step in steps),
    )


def _times(rank: int, step: _Step) -> StepTimes:
    own = step.ranks[rank]
    marks = [own_clock(rank, mark) for mark in own.marks]
    return StepTimes(
        marks=marks,
        busy=marks,
        process_busy=marks[-1] - marks[0],
        arrivals=[own_clock(rank, arrival) for arrival in step.arrivals(rank)],
        collectives=[
            CollectiveTimes(
                each.group_name, *(own_clock(rank, at) for at in (each.entered, each.wait_begun, each.wait_ended))
            )
            for each in own.collectives
        ],
        sent_bytes=(0, 0),
    )


def own_clock(rank: int, moment: int) -> int:
    """Rank 0's is the true one."""
    return moment + rank * (_AHEAD_NS + round(_DRIFT * (moment - 10**12)))


def _offset(rank: int, moment: int) -> ClockOffset:
    at = own_clock(rank, moment)
    return ClockOffset(at, at - moment, 500)
