"""The thread beside training: writes this rank's heartbeat, and ends the rank when training stands still.

It watches until the process has left: a rank that freezes behind the last step would keep the job for ever.
It speaks before the process groups' own timeouts do, since those name whoever waits. All ranks stand still together,
so each has its own watchdog fire: every rank's stacks are in the logs, and the first to fire tells the launcher why.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from lime_dist.config import Config
from lime_dist.lifecycle.collective_trace import record_collectives, runs_on_nccl, trace_folder, write_collectives
from lime_dist.lifecycle.ending import FAILED, write_outcome
from lime_dist.lifecycle.heartbeat import Heartbeat, heartbeat_folder, read_heartbeats, write_heartbeat, written_since
from lime_dist.lifecycle.launcher import Place
from lime_dist.lifecycle.local import leave_because_of
from lime_dist.lifecycle.pulse import Moment, Pulse
from lime_dist.lifecycle.silence import find_cause, find_died, last_known, who

_INTERVAL = 1.0  # seconds between heartbeats
_GRACE = 10.0  # seconds before a rank that has fired leaves: those that moved a little later still show their stacks
_LOST_PEER = re.compile(r"connection|peer|NCCL|remote process", re.IGNORECASE)  # in what gloo and NCCL say
_TICKS_COUNTED = 3  # of a longer pause between two looks only this many intervals count as silence
_DEATH_TICKS = 5  # intervals without a heartbeat after which a rank whose connections broke counts as dead


class Watchdog:
    """Heartbeats of `pulse` in `folder` (default: the run's) for the time of a `with`, and an end to the process after
    `run.timeout_seconds` without a beat, or as long after the `with`: the process is to leave behind it.

    A disk that fails does no harm but to the heartbeats.
    """

    def __init__(self, config: Config, place: Place, pulse: Pulse, folder: Path | None = None):
        self._layout, self._rank, self._pulse = config.layout, place.rank, pulse
        self._folder = folder or heartbeat_folder(Path(config.run.dir))
        self._traces = trace_folder(Path(config.run.dir))
        self._timeout = config.run.timeout_seconds
        self._interval, self._grace = min(_INTERVAL, self._timeout / 10), min(_GRACE, self._timeout / 4)
        self._host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._began, self._disk_failed, self._settled = time.time(), False, ""
        self._leaving, self._said_so = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        record_collectives(self._traces)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
            self._name_who_died()
        self._leaving.set()
        self._said_so.wait(self._grace)  # no longer: a disk that hangs must not keep the rank

    def _name_who_died(self) -> None:
        """A rank that was killed shows as a broken connection to whoever talked to it, and writes no more heartbeats."""
        before = self._read()
        time.sleep(_DEATH_TICKS * self._interval)
        if (died := find_died(before, self._read())) is not None:
            reason = (
                f"{who(self._layout, died.global_rank)} {last_known(died)}; it has died: its connections are closed"
            )
            if write_outcome(FAILED, reason):
                print(f"lime-dist: {reason}", file=sys.stderr, flush=True)

    def _read(self) -> list[Heartbeat | None]:
        return written_since(read_heartbeats(self._folder, self._layout.world_size), self._began)

    def settle(self, code: int, reason: str) -> None:
        """The run has ended so, whatever becomes of ranks that do not leave: it is saved on all of them."""
        self._settled = f"; the run itself had ended: {reason}"
        write_outcome(code, reason)

    def _watch(self) -> None:
        self._write(self._pulse.last)
        silence = self._silence()
        while not self._leaving.wait(self._interval):
            silent = next(silence)
            self._write(self._pulse.last)
            if silent >= self._timeout:
                self._give_up()
        self._write(self._pulse.last, ended=True)
        self._said_so.set()
        self._see_out()

    def _silence(self) -> Iterator[float]:
        """Seconds without a beat, at each look; without end."""
        silent, seen, before = 0.0, self._pulse.last, time.monotonic()
        while True:
            moment, now = self._pulse.last, time.monotonic()
            # Time in which this process did not run, as in a job that was suspended, is nobody's silence.
            silent = silent + min(now - before, _TICKS_COUNTED * self._interval) if moment is seen else 0.0
            seen, before = moment, now
            yield silent

    def _see_out(self) -> None:
        """No other rank may be left to notice that this one does not leave."""
        for silent in self._silence():
            if silent >= self._timeout:
                self._end(self._rank, f"rank {self._rank} has not left for {self._timeout:.0f} s")
            time.sleep(self._interval)

    def _write(self, moment: Moment, ended: bool = False) -> None:
        try:
            write_heartbeat(self._folder, self._heartbeat(moment, ended))
        except OSError as error:
            if not self._disk_failed:
                where = f"rank {self._rank}: no heartbeat in {self._folder}"
                print(f"lime-dist: {where}: {error.strerror or error}", file=sys.stderr, flush=True)
            self._disk_failed = True

    def _heartbeat(self, moment: Moment, ended: bool) -> Heartbeat:
        return Heartbeat(
            global_rank=self._rank,
            coordinate=self._layout.coordinate(self._rank),
            host=self._host,
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID"),
            step=moment.step,
            phase=moment.phase,
            at=moment.at,
            busy=moment.busy,
            done=moment.done,
            moved=moment.time,
            alive=time.time(),
            ended=ended,
            passes=moment.passes,
            awaits=moment.awaits,
            awaited=moment.awaited,
        )

    def _give_up(self) -> NoReturn:
        cause = find_cause(self._layout, self._read(), time.time(), self._timeout / 2)
        note = f"; that counts what was launched, {self._traces} has what was done" if runs_on_nccl() else ""
        self._end(cause.rank, f"no progress for {self._timeout:.0f} s; {cause.text}{note}")

    def _end(self, rank: int, silence: str) -> NoReturn:
        reason = f"{silence}{self._settled}"
        print(f"lime-dist: {reason}\nstacks of rank {self._rank}:\n{_stacks()}", file=sys.stderr, flush=True)
        write_outcome(FAILED, reason)
        if (trace := write_collectives(self._traces, self._rank, self._grace)) is not None:
            print(f"collectives of rank {self._rank}: {trace}", file=sys.stderr, flush=True)
        time.sleep(self._grace)
        leave_because_of(rank, reason)


def _stacks() -> str:
    """Of all threads; one text, so that those of ranks that share a terminal do not mix, and without a file, as disks fail."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"Thread {names.get(identity, identity)}:\n{''.join(traceback.format_stack(frame))}"
        for identity, frame in sys._current_frames().items()
    )
