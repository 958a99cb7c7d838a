"""The wish to stop: a signal of `STOP_SIGNALS` only sets a flag, which all ranks compare between steps (`joint_stop.py`). No torch.

A rank that has not met the others yet has nobody to agree with and nothing to lose: it leaves at once.

A Python signal handler waits for the interpreter, which a rank that stands in a collective does not reach. The
signal's byte in the wakeup pipe does not wait, so a thread reads it there and a second signal can end a rank that hangs.
Another signal than the one before is no second one: at a time limit that is near SIGUSR1 comes, then SIGTERM at the limit, and a
rank that saves by then has a little time left.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lime_dist.lifecycle.ending import REQUEUE, write_outcome

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
    signal.SIGHUP,
)  # Ctrl-C, and a terminal that goes, among them
STOPPING = "stopping after this step or evaluation batch"
REPEAT_WINDOW_SECONDS = 2.0  # schedulers send one wish several times over: to the process, its parent and its group


def heard_signals() -> tuple[signal.Signals, ...]:
    """Those that this process was not started to ignore, as by `nohup`, or in the background of a script."""
    return tuple(number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


class Terminal:
    """Where output goes, if that is a terminal: when it has gone every write to it fails, which must not end a run that saves."""

    def __init__(self) -> None:
        self._descriptors = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._descriptors:
            os.dup2(nowhere, descriptor)


class StopRequest:
    """What this process was asked by signals; one a process, made by `stop_request`."""

    def __init__(self) -> None:
        self.signal_name: str | None = None  # the first
        self.is_alone = False  # a rank that a launcher has started, until it has met the others
        self.says_so = True  # of several ranks one, as schedulers signal all
        self._last: tuple[int, float] = (0, 0.0)  # signal, and when
        self._terminal = Terminal()
        receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        for number in heard_signals():
            signal.signal(number, _leave_to_the_thread)
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(receiver,), name="stop-request", daemon=True).start()

    def _watch(self, receiver: int) -> None:
        while True:
            for number in os.read(receiver, 64):
                if number in STOP_SIGNALS:
                    self._ask(signal.Signals(number))

    def _ask(self, number: signal.Signals) -> None:
        if number == signal.SIGHUP:
            self._terminal.leave()
        before, when = self._last
        self._last = number, time.monotonic()
        if self.signal_name is None:
            self.signal_name = number.name
            self._begin_to_stop(number.name)
        elif number == before and self._last[1] - when > REPEAT_WINDOW_SECONDS:
            print(f"{number.name} again: leaving at once", file=sys.stderr, flush=True)
            os._exit(128 + number)

    def _begin_to_stop(self, name: str) -> None:
        if self.is_alone:
            _leave_before_the_meeting(name)
        if self.says_so:
            print(f"{name}: {STOPPING}", file=sys.stderr, flush=True)


def _leave_before_the_meeting(name: str) -> NoReturn:
    if write_outcome(REQUEUE, f"{name} before the ranks had met"):
        print(f"{name}: leaving before the ranks have met", file=sys.stderr, flush=True)
    os._exit(REQUEUE)


@contextmanager
def leaving_when_asked() -> Iterator[None]:
    """For a command that has no ranks yet: a signal ends it at once as one to be started again, Ctrl-C as it ends any command."""

    def leave(number: int, _: object) -> None:
        _leave_before_the_meeting(signal.Signals(number).name)

    before = {number: signal.signal(number, leave) for number in heard_signals() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_to_the_thread(*_: object) -> None:
    """Present so that the signal's default, to end the process, does not happen."""


@functools.cache
def stop_request() -> StopRequest:
    """This process's wish to stop; the first call, on the main thread, begins to catch the signals."""
    return StopRequest()
