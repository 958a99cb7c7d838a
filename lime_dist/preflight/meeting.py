"""Where the ranks meet before there is a process group: a TCP store on rank 0's host. Knows no value it passes.

Every wait ends, so that whoever does not come is named by those who did.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lime_dist.errors import LayoutError, one_line
from lime_dist.launcher import Place, host_name
from lime_dist.rank import naming_taken_port

_ROUNDS_HEARD = 3  # rank 0 speaks after at most as many waits for others, of the full time each
_LEAVE_SECONDS = 10
_POLL_SECONDS = 0.02
_JOIN_SHARE, _RETRY_SECONDS = 0.8, 0.5  # who cannot reach rank 0 says so before rank 0 gives it up
_CLOCK_ROUNDS, _CLOCK_SECONDS = 3, 10


class MeetingFailed(RuntimeError):
    """This rank and rank 0 do not find each other; the message names this rank's host and what is wrong."""


class Unreachable(MeetingFailed):
    """This rank has not come to the meeting, so rank 0 will miss it."""


class Meeting:
    """Values put under a name by each rank, and told to all by rank 0. `seconds`: how long to wait for another rank."""

    def __init__(self, store: dist.Store, place: Place, seconds: float):
        self._store, self._place, self._seconds = dist.PrefixStore("preflight", store), place, seconds

    @classmethod
    def join(cls, place: Place, seconds: float, environment: Mapping[str, str] = os.environ) -> Meeting:
        """Rank 0 opens the meeting, or torchrun's agent has. Raises: Unreachable, LayoutError."""
        host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
        if not port.isdigit():
            raise LayoutError(f"environment: MASTER_PORT={port} is no port; set a number")
        is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if place.rank > 0 or is_agents:
            _wait_for_server(host, int(port), _JOIN_SHARE * seconds)
        try:
            with naming_taken_port():
                store = dist.TCPStore(
                    host,
                    int(port),
                    world_size=place.world_size,
                    is_master=place.rank == 0 and not is_agents,
                    timeout=timedelta(seconds=seconds),
                    wait_for_workers=False,  # it would not say who is missing
                    multi_tenant=True,  # the process group's store then has the same server
                )
        except dist.DistError as error:
            raise _unreachable(host, port, one_line(error).partition(" Exception raised from ")[0]) from None
        return cls(store, place, seconds)

    def put(self, name: str, value: Any) -> None:
        self._store.set(f"{name}/{self._place.rank}", pickle.dumps(value))

    def take(self, name: str, ranks: Iterable[int], seconds: float | None = None) -> dict[int, Any]:
        """What those of `ranks` put that did so in time."""
        deadline = time.monotonic() + (self._seconds if seconds is None else seconds)
        keys = {rank: f"{name}/{rank}" for rank in ranks}
        return {rank: pickle.loads(self._store.get(key)) for rank, key in keys.items() if self._comes(key, deadline)}

    def _comes(self, key: str, deadline: float) -> bool:
        """Asks again and again: the store's own `wait` prints warnings when it ends in vain."""
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def tell(self, name: str, value: Any) -> None:
        """To all ranks; rank 0 alone may."""
        self._store.set(name, pickle.dumps(value))

    def hear(self, name: str) -> Any:
        """What rank 0 tells. Raises: MeetingFailed when it has gone or says nothing."""
        seconds = _ROUNDS_HEARD * self._seconds
        try:
            self._store.wait([name], timedelta(seconds=seconds))
            return pickle.loads(self._store.get(name))
        except dist.DistError:
            reason = f"rank 0 has ended, or said nothing for {seconds:.0f} s"
            raise MeetingFailed(f"host {host_name()}, rank {self._place.rank}: {reason}") from None

    @contextmanager
    def last_word(self, ranks: Iterable[int]) -> Iterator[None]:
        """Once `ranks`, which came, have heard the verdict, rank 0 does what stands in the block; the others wait.

        A launcher may end all ranks with SIGTERM when the first leaves with an error. So rank 0 says why before any
        leaves, and from then on each leaves with its own code.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._gather("heard", ranks)
        yield
        if self._place.rank == 0:
            self.tell("end", None)
        with suppress(MeetingFailed, dist.DistError):  # rank 0 does not wait for long
            self.hear("end")
            self._gather("left", ranks)

    def _gather(self, name: str, ranks: Iterable[int]) -> None:
        """Rank 0, which keeps the store open, waits a little while for the others."""
        self.put(name, None)
        if self._place.rank == 0:
            self.take(name, ranks, min(self._seconds, _LEAVE_SECONDS))

    def measure_clock(self, rank: int) -> tuple[float, float] | None:
        """How far the clock of `rank` is ahead of this one, and the error, half a round trip; in seconds.

        `rank` must call `answer_clock`; None when it does not.
        """
        trips = []
        for round_index in range(_CLOCK_ROUNDS):
            asked = time.time()
            self.tell(f"ask/{rank}/{round_index}", None)
            answers = self.take(f"clock/{round_index}", [rank], _CLOCK_SECONDS)
            heard = time.time()
            if rank not in answers:
                return None
            trips.append((answers[rank] - (asked + heard) / 2, (heard - asked) / 2))
        return min(trips, key=lambda trip: trip[1])

    def answer_clock(self) -> None:
        for round_index in range(_CLOCK_ROUNDS):
            self.hear(f"ask/{self._place.rank}/{round_index}")
            self.put(f"clock/{round_index}", time.time())


def _wait_for_server(host: str, port: int, seconds: float) -> None:
    """A plain connection tells why it fails, and in time; the store's own client tells neither. Raises: Unreachable."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _unreachable(host, port, error.strerror or str(error)) from None
        time.sleep(_RETRY_SECONDS)


def _unreachable(host: str, port: int | str, reason: str) -> Unreachable:
    return Unreachable(f"host {host_name()} is bad: it cannot reach MASTER_ADDR:MASTER_PORT {host}:{port} ({reason})")
