"""Where the ranks meet before there is a process group: a TCP store on rank 0's host. Passes values, knows none of them.

Every wait ends, so that whoever does not come is named by those who did.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lime_dist.errors import LayoutError, one_line
from lime_dist.launcher import Place, host_name
from lime_dist.rank import naming_taken_port

_ROUNDS_HEARD = 3  # rank 0 speaks after at most as many waits for others, of the full time each
_LEAVE_SECONDS = 10
_CLOCK_ROUNDS, _CLOCK_SECONDS = 3, 10


class MeetingFailed(RuntimeError):
    """This rank and rank 0 do not find each other; the message names this rank's host and what is wrong."""


class Meeting:
    """Values put under a name by each rank, and told to all by rank 0. `seconds`: how long to wait for another rank."""

    def __init__(self, store: dist.Store, place: Place, seconds: float):
        self._store, self._place, self._seconds = dist.PrefixStore("preflight", store), place, seconds

    @classmethod
    def join(cls, place: Place, seconds: float, environment: Mapping[str, str] = os.environ) -> Meeting:
        """Rank 0 opens the meeting, or torchrun's agent has. Raises: MeetingFailed, LayoutError."""
        host, port = _address(environment)
        is_agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            with naming_taken_port():
                store = dist.TCPStore(
                    host,
                    port,
                    world_size=place.world_size,
                    is_master=place.rank == 0 and not is_agents,
                    timeout=timedelta(seconds=seconds),
                    wait_for_workers=False,  # it would not say who is missing
                    multi_tenant=True,  # the process group's store then has the same server
                )
        except dist.DistError as error:
            text = one_line(error).partition(" Exception raised from ")[0]
            raise _unreachable(f"MASTER_ADDR:MASTER_PORT {host}:{port} cannot be reached from there ({text})") from None
        return cls(store, place, seconds)

    def put(self, name: str, value: Any) -> None:
        self._store.set(f"{name}/{self._place.rank}", pickle.dumps(value))

    def take(self, name: str, ranks: Iterable[int], seconds: float | None = None) -> dict[int, Any]:
        """What those of `ranks` put that did so in time."""
        deadline = time.monotonic() + (self._seconds if seconds is None else seconds)
        found = {}
        for rank in ranks:
            try:
                found[rank] = self._get(f"{name}/{rank}", deadline - time.monotonic())
            except dist.DistStoreError:
                continue
        return found

    def tell(self, name: str, value: Any) -> None:
        """To all ranks; rank 0 alone may."""
        self._store.set(name, pickle.dumps(value))

    def hear(self, name: str) -> Any:
        """What rank 0 tells. Raises: MeetingFailed when it has gone or says nothing."""
        seconds = _ROUNDS_HEARD * self._seconds
        try:
            return self._get(name, seconds)
        except dist.DistError:
            reason = f"rank 0 has ended, or said nothing for {seconds:.0f} s"
            raise MeetingFailed(f"host {host_name()}, rank {self._place.rank}: {reason}") from None

    def part(self, ranks: Iterable[int]) -> None:
        """Rank 0 keeps the store open until `ranks`, which came, have left, or a little while."""
        self.put("left", True)
        if self._place.rank == 0:
            self.take("left", ranks, min(self._seconds, _LEAVE_SECONDS))

    def measure_clock(self, rank: int) -> tuple[float, float] | None:
        """How far the clock of `rank`, which calls `answer_clock`, is ahead of this one; and the error, half a round trip.

        In seconds; None when it does not answer.
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

    def _get(self, key: str, seconds: float) -> Any:
        self._store.wait([key], timedelta(seconds=max(seconds, 0.001)))
        return pickle.loads(self._store.get(key))


def _unreachable(reason: str) -> MeetingFailed:
    return MeetingFailed(f"host {host_name()} is bad: {reason}")


def _address(environment: Mapping[str, str]) -> tuple[str, int]:
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if not port.isdigit():
        raise LayoutError(f"environment: MASTER_PORT={port} is no port; set a number")
    try:
        socket.getaddrinfo(host, int(port))
    except OSError as error:
        raise _unreachable(f"MASTER_ADDR {host} does not resolve there ({error.strerror})") from None
    return host, int(port)
