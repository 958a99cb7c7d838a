"""What a rank last did, in memory: the training thread beats, another one reads. Knows no files and no torch.

A rank that waits for another has finished its last piece of work, one that holds the others up is inside of a
piece or has finished fewer: so beats come before and after a piece, and finished ones are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Pass(NamedTuple):
    """Of a microbatch through a chunk."""

    chunk: int
    microbatch: int  # from 1


class Moment(NamedTuple):
    """One beat."""

    step: int  # the update being made, from 1; 0 before the first
    phase: str  # start, load, data, forward, backward, update, evaluate, record, save, close or leave
    at: Pass | None  # of forward and backward
    busy: bool  # inside of this piece of work, not behind it
    done: int  # pieces of work finished since the start; every rank of a run has as many a step
    time: float  # seconds since the epoch
    # Of forward and backward by this rank's chunks, those finished since the start; as many for every chunk in the end.
    passes: Mapping[str, Mapping[int, int]] = {}
    awaits: str | None = None  # the kind of pass whose input has not come from the neighbouring stage
    awaited: Pass | None = None  # that pass


class Pulse:
    """One rank's last beat. A beat replaces one tuple, so that a reader on another thread never sees half of it."""

    def __init__(self) -> None:
        self.last = Moment(0, "start", None, True, 0, time.time())
        self._ahead: dict[str, Sequence[Pass]] = {}  # by kind
        self._counts: dict[str, int] = {}  # of those begun

    def beat(self, phase: str) -> None:
        """`phase`, which is no pass, begins."""
        self._move(phase, None, busy=True, done=self.last.done + 1)

    def finish(self) -> None:
        """What the last `beat` began is done: from here on the rank may wait for others."""
        self._move(self.last.phase, None, busy=False, done=self.last.done + 1)

    def begin_step(self, step: int) -> None:
        """Update `step` (from 1) begins with its data."""
        self.last = self.last._replace(step=step)
        self.beat("data")

    def expect(self, passes: Mapping[str, Sequence[Pass]]) -> None:
        """The passes of a step or an evaluation, by kind in the order in which they will come."""
        self._ahead, self._counts = dict(passes), dict.fromkeys(passes, 0)
        counted = {
            kind: {each.chunk: 0 for each in order} | dict(self.last.passes.get(kind, {}))
            for kind, order in passes.items()
        }
        self.last = self.last._replace(passes={**self.last.passes, **counted})

    def around(self, kind: str, work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """`work`, which is the next pass of its kind, with a beat before and after."""

        def watched(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
            this = self._next(kind)
            self._counts[kind] += 1
            self._move(kind, this, busy=True, done=self.last.done)
            result = work(*args, **keywords)
            self._count(kind, this)
            self._move(kind, this, busy=False, done=self.last.done + 1)
            return result

        return watched

    def awaiting(self, kind: str, awaited: Pass, wait: Callable[[], Result]) -> Result:
        """`wait` for what the neighbouring stage sends for the pass `awaited`, before the pass, within it or behind it."""
        self.last = self.last._replace(awaits=kind, awaited=awaited, time=time.time())
        result = wait()
        self.last = self.last._replace(awaits=None, awaited=None, time=time.time())
        return result

    def touch(self) -> None:
        """The rank is still at it, and moves: for pieces of work that may be long."""
        self.last = self.last._replace(time=time.time())

    def _next(self, kind: str) -> Pass:
        return self._ahead[kind][self._counts[kind]]

    def _count(self, kind: str, finished: Pass) -> None:
        passes = self.last.passes
        counted = {**passes[kind], finished.chunk: passes[kind][finished.chunk] + 1}
        self.last = self.last._replace(passes={**passes, kind: counted})

    def _move(self, phase: str, at: Pass | None, *, busy: bool, done: int) -> None:
        self.last = self.last._replace(phase=phase, at=at, busy=busy, done=done, time=time.time())
