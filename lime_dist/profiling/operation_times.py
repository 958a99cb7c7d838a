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


class OwnTime(NamedTuple):
    """Seconds of a step that a rank itself was busy, from its first operation to its last: no waits.

    forward, backward: computing, as if each pass took as long as the quickest quarter of its kind. whole, host: of the median
    step, with what messages take of the host, and that alone.
    """

    forward: float
    backward: float
    whole: float
    host: float


def own_time(profile: Profile, rank: int) -> OwnTime:
    passes: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    steps, hosts = [], []
    for step in timed_operations(profile, rank):
        of_pass = 0.0
        steps.append(0.0)
        hosts.append(0.0)
        for timed in step:
            if timed.operation.verb is Verb.AWAIT:
                continue
            own = timed.seconds - timed.collective
            steps[-1] += own
            if timed.operation.verb is Verb.RUN:
                of_pass += own
            else:
                hosts[-1] += own
            if timed.operation.until == "behind":
                passes[timed.operation.action.chunk, timed.operation.action.kind].append(of_pass)
                of_pass = 0.0
    steady = dict.fromkeys(Kind, 0.0)
    for (_, kind), found in passes.items():
        steady[kind] += sorted(found)[len(found) // 4] * len(found) / len(steps)
    return OwnTime(steady[Kind.FORWARD], steady[Kind.BACKWARD], median(steps), median(hosts))


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
