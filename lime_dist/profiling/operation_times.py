"""What single operations of a rank took, on its own clock. Pure data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from lime_dist.pipeline.step_times import StepTimes
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.profile_files import Profile


class Timed(NamedTuple):
    """seconds: of which it waited in collectives for `collective`; busy: for which this thread had a core, None on a GPU."""

    operation: Operation
    seconds: float
    collective: float
    busy: float | None


def timed_operations(profile: Profile, rank: int) -> Iterator[list[Timed]]:
    """Of each recorded step, in the plan's order."""
    stage = profile.plan.stages[profile.plan.layout.coordinate(rank).pp_rank]
    operations = tuple(stage.operations(stage.actions))
    for step in profile.ranks[rank].steps:
        waits = _Waits(step)
        yield [
            Timed(
                operation,
                (step.marks[place + 2] - step.marks[place + 1]) / 1e9,
                waits.within(step.marks[place + 1], step.marks[place + 2]) / 1e9,
                None if step.busy is None else (step.busy[place + 2] - step.busy[place + 1]) / 1e9,
            )
            for place, operation in enumerate(operations)
        ]


class _Waits:
    """In collectives, asked for in order."""

    def __init__(self, step: StepTimes):
        self._spans = sorted((each.wait_begun, each.wait_ended) for each in step.collectives)
        self._next = 0

    def within(self, begin: int, end: int) -> int:
        total = 0
        while self._next < len(self._spans) and self._spans[self._next][0] < end:
            span = self._spans[self._next]
            total += max(0, min(end, span[1]) - max(begin, span[0]))
            self._next += 1
        return total


def pass_seconds_of(profile: Profile, rank: int) -> dict[tuple[int, Kind], float]:
    """Median time of computing of a pass, by chunk and kind, waits in collectives left out."""
    passes: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for step in timed_operations(profile, rank):
        seconds = 0.0
        for timed in step:
            if timed.operation.verb is not Verb.RUN:
                continue
            seconds += timed.seconds - timed.collective
            if timed.operation.until == "behind":
                passes[timed.operation.action.chunk, timed.operation.action.kind].append(seconds)
                seconds = 0.0
    return {place: median(found) for place, found in passes.items()}


def without_core(profile: Profile, rank: int) -> float:
    """Seconds of a step's computing for which the host's other processes had the core; 0 on a GPU."""
    steps = [
        sum(
            max(0.0, timed.seconds - timed.collective - timed.busy)
            for timed in step
            if timed.operation.verb is Verb.RUN and timed.busy is not None
        )
        for step in timed_operations(profile, rank)
    ]
    return sum(steps) / len(steps)
