"""What a rank last did, in memory: the training thread beats, another one reads. Knows no files and no torch.

A rank that waits for another has finished its last piece of work, one that holds the others up is inside of a
piece or has finished fewer: so beats come before and after a piece, and finished ones are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

Result = TypeVar("Result")


class Moment(NamedTuple):
    """One beat."""

    step: int  # the update being made, from 1; 0 before the first
    phase: str  # start, load, data, forward, backward, update, evaluate, record, save, close or leave
    microbatch: int | None  # from 1
    busy: bool  # inside of this piece of work, not behind it
    done: int  # pieces of work finished since the start; every rank of a run has as many a step
    time: float  # seconds since the epoch
    passes: Mapping[
        str, int
    ] = {}  # forward, backward: those finished since the start; as many on every stage in the end
    awaits: str | None = None  # the pass whose input has not come from the neighbouring stage
    awaited_microbatch: int | None = None


class Pulse:
    """One rank's last beat. A beat replaces one tuple, so that a reader on another thread never sees half of it."""

    def __init__(self) -> None:
        self.last = Moment(0, "start", None, True, 0, time.time())
        self._counts: dict[str, int] = {}

    def beat(self, phase: str) -> None:
        """`phase`, which has no microbatches of its own, begins."""
        self._counts.clear()
        self._move(phase, None, busy=True, done=self.last.done + 1)

    def finish(self) -> None:
        """What the last `beat` began is done: from here on the rank may wait for others."""
        self._move(self.last.phase, None, busy=False, done=self.last.done + 1)

    def begin_step(self, step: int) -> None:
        """Update `step` (from 1) begins with its data."""
        self.last = self.last._replace(step=step)
        self.beat("data")

    def around(self, phase: str, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work` on one microbatch of `phase`, with a beat before and after."""

        def watched(*args: object) -> Result:
            microbatch = self._counts[phase] = self._counts.get(phase, 0) + 1
            self._move(phase, microbatch, busy=True, done=self.last.done)
            result = work(*args)
            self._count_pass(phase)
            self._move(phase, microbatch, busy=False, done=self.last.done + 1)
            return result

        return watched

    def awaiting(self, phase: str, wait: Callable[[], Result]) -> Result:
        """`wait` for what the neighbouring stage sends for the next pass of `phase`."""
        microbatch = self._counts.get(phase, 0) + 1
        self.last = self.last._replace(awaits=phase, awaited_microbatch=microbatch, time=time.time())
        result = wait()
        self.last = self.last._replace(awaits=None, awaited_microbatch=None, time=time.time())
        return result

    def touch(self) -> None:
        """The rank is still at it, and moves: for pieces of work that may be long."""
        self.last = self.last._replace(time=time.time())

    def _count_pass(self, phase: str) -> None:
        passes = self.last.passes
        self.last = self.last._replace(passes={**passes, phase: passes.get(phase, 0) + 1})

    def _move(self, phase: str, microbatch: int | None, *, busy: bool, done: int) -> None:
        self.last = self.last._replace(phase=phase, microbatch=microbatch, busy=busy, done=done, time=time.time())
