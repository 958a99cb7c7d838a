"""What ranks do in test_local.py; quick to import, as a fresh interpreter does."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from pathlib import Path

from lime_dist.errors import DataError
from lime_dist.lifecycle import local
from lime_dist.lifecycle.launcher import find_place
from lime_dist.lifecycle.local import leave_because_of
from lime_dist.lifecycle.ownership import RunTaken
from lime_dist.lifecycle.stopping import STOP_SIGNALS


def place_and_sum(base: int) -> tuple[int, int, int]:
    place = find_place()
    time.sleep(0.02 * (3 - place.rank))  # the first rank ends last
    return base + place.rank, place.local_rank, place.world_size


def environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}


def pid_and_flag() -> tuple[int, bool]:
    return os.getpid(), getattr(sys, "marked", False)


def fail(rank: int, how: str) -> None:
    if find_place().rank != rank:
        time.sleep(60)
    if how == "raise":
        raise KeyError("lost")
    if how == "refuse":
        raise DataError("data.train: no such file")
    if how == "taken":
        raise RunTaken("run.dir: taken over")
    if how == "blame":
        leave_because_of(2, "silent for 8 s")
    if how == "unsendable":
        return {1, 2}
    if how == "exit":
        os._exit(7)
    if how == "interrupt":
        raise SystemExit(3)
    if how == "within a result":
        os.write(local._to_parent.fileno(), struct.pack("!i", 1000) + b"half of it")
        how = "SIGKILL"
    os.kill(os.getpid(), getattr(signal, how))


def sleep_unless(rank: int) -> None:
    time.sleep(60 * (find_place().rank != rank))


def report_pid_and_wait(folder: Path, deaf: bool) -> None:
    """Rank 0 fails when all ranks are here, which then sleep."""
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / str(os.getpid())).touch()
    while find_place().rank == 0 and len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    if find_place().rank == 0:
        raise ValueError
    time.sleep(60)


def handlers_of() -> list[bool]:
    """Whether SIGHUP and SIGINT are ignored here."""
    return [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGHUP, signal.SIGINT)]


def answer_signal(folder: Path) -> str:
    """The name of the first signal that asks to stop."""
    heard = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: heard.append(signal.Signals(number).name))
    (folder / str(os.getpid())).touch()
    while not heard:
        time.sleep(0.01)
    return heard[0]
