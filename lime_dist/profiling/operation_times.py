"""What single operations of a rank took, on its own clock. Pure data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

from lime_dist.pipeline.step_times import StepTimes
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.profile_files import Profile


class Timed(NamedTuple):
    """seconds: of which it waited in collectives for `collective`. busy: for which this thread had a core, None on a GPU.
    delayed: for which it was ready to run and had none; None where that is not known."""

    operation: Operation
    seconds: float
    collective: float
    busy: float | None
    delayed: float | None

    @property
    def own(self) -> float:
        """Not in collectives, and as if there had always been a core."""
        return self.seconds - self.collective - (self.delayed or 0.0)

    @property
    def without_core(self) -> float:
        if self.delayed is not None or self.busy is None:
            return self.delayed or 0.0
        return max(0.0, self.seconds - self.collective - self.busy)


def timed_operations(profile: Profile, rank: int) -> Iterator[list[Timed]]:
    """Of each recorded step, in the plan's order."""
    stage = profile.plan.stages[profile.plan.layout.coordinate(rank).pp_rank]
    operations = tuple(stage.operations(stage.actions))
    for step in profile.ranks[rank].steps:
        waits = _Waits(step)
        yield [_timed(step, waits, operation, place + 1) for place, operation in enumerate(operations)]


def _timed(step: StepTimes, waits: _Waits, operation: Operation, place: int) -> Timed:
    """place: of the mark before it."""

    def passed(counts: Sequence[int]) -> float:
        return (counts[place + 1] - counts[place]) / 1e9

    seconds, collective = passed(step.marks), waits.within(step.marks[place], step.marks[place + 1]) / 1e9
    busy = None if step.busy is None else passed(step.busy)
    if busy is None or step.delayed is None:
        return Timed(operation, seconds, collective, busy, None)
    # What it was delayed in a collective is part of that.
    return Timed(operation, seconds, collective, busy, min(passed(step.delayed), max(0.0, seconds - collective - busy)))


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
    step, with what messages take of the host, and that alone. All as if it had had a core, where it is known when it had none:
    delayed, of the median step.
    """

    forward: float
    backward: float
    whole: float
    host: float
    delayed: float


def own_time(profile: Profile, rank: int) -> OwnTime:
    passes: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    steps, hosts, delays = [], [], []
    for step in timed_operations(profile, rank):
        own = [timed for timed in step if timed.operation.verb is not Verb.AWAIT]
        steps.append(sum(timed.own for timed in own))
        hosts.append(sum(timed.own for timed in own if timed.operation.verb is not Verb.RUN))
        delays.append(sum(timed.delayed or 0.0 for timed in own))
        of_pass = 0.0
        for timed in own:
            if timed.operation.verb is Verb.RUN:
                of_pass += timed.own
            if timed.operation.until == "behind":
                passes[timed.operation.action.chunk, timed.operation.action.kind].append(of_pass)
                of_pass = 0.0
    steady = dict.fromkeys(Kind, 0.0)
    for (_, kind), found in passes.items():
        steady[kind] += sorted(found)[len(found) // 4] * len(found) / len(steps)
    return OwnTime(steady[Kind.FORWARD], steady[Kind.BACKWARD], median(steps), median(hosts), median(delays))


def without_core(profile: Profile, rank: int) -> float:
    """Seconds of a step's computing for which the host's other processes had the core; 0 on a GPU."""
    steps = [
        sum(timed.without_core for timed in step if timed.operation.verb is Verb.RUN)
        for step in timed_operations(profile, rank)
    ]
    return sum(steps) / len(steps)
