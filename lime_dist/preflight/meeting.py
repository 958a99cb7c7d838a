"""Where the ranks meet before there is a process group: a TCP store on rank 0's host. Knows no value it passes, but takes
none that is not of its topic's shape or, where the job has a secret, not signed with it.

Every wait ends, so that whoever does not come is named by those who did.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from lime_dist.errors import one_line
from lime_dist.lifecycle.launcher import Place, host_name, job_secret
from lime_dist.lifecycle.network import meeting_host
from lime_dist.lifecycle.rendezvous import is_agents, master_port, open_store
from lime_dist.preflight.signed_json import Refused, Topic, pack, unpack

_ROUNDS_HEARD = 3  # rank 0 speaks after at most as many waits for others, of the full time each
_LEAVE_SECONDS = 10
_POLL_SECONDS = 0.02
_JOIN_SHARE, _RETRY_SECONDS = 0.8, 0.5  # who cannot reach rank 0 says so before rank 0 gives it up
_CLOCK_ROUNDS, _CLOCK_SECONDS = 3, 10
_HEARD, _LEFT, _END = (Topic[None](name, None) for name in ("heard", "left", "end"))

T = TypeVar("T")


class MeetingFailed(RuntimeError):
    """This rank and rank 0 do not find each other; the message names this rank's host and what is wrong."""


class Unreachable(MeetingFailed):
    """This rank has not come to the meeting, so rank 0 will miss it."""


class Meeting:
    """Values put under a topic by each rank, and told to all by rank 0. `seconds`: how long to wait for another rank.

    Every method that reads raises MeetingFailed for what no rank of this job has written.
    """

    def __init__(self, store: dist.Store, place: Place, seconds: float, secret: bytes | None):
        self.store, self._place, self._seconds, self._secret = store, place, seconds, secret
        self._values = dist.PrefixStore("preflight", store)

    @classmethod
    def join(cls, place: Place, seconds: float, environment: Mapping[str, str] = os.environ) -> Meeting:
        """Rank 0 opens the meeting, or torchrun's agent has. Raises: Unreachable, LayoutError."""
        host, port = meeting_host(place, environment), master_port(environment)
        if place.rank > 0 or is_agents(environment):
            _wait_for_server(host, port, _JOIN_SHARE * seconds)
        try:
            # Not waiting for all: it would not say who is missing.
            store = open_store(place, timedelta(seconds=seconds), environment, wait_for_all=False)
        except dist.DistError as error:
            raise _unreachable(host, port, one_line(error).partition(" Exception raised from ")[0]) from None
        return cls(store, place, seconds, job_secret(environment))

    def put(self, topic: Topic[T], value: T) -> None:
        self._write(f"{topic.name}/{self._place.rank}", value)

    def take(self, topic: Topic[T], ranks: Iterable[int], seconds: float | None = None) -> dict[int, T]:
        """What those of `ranks` put that did so in time."""
        deadline = time.monotonic() + (self._seconds if seconds is None else seconds)
        keys = {rank: f"{topic.name}/{rank}" for rank in ranks}
        return {rank: self._read(topic, key, rank) for rank, key in keys.items() if self._comes(key, deadline)}

    def _comes(self, key: str, deadline: float) -> bool:
        """Asks again and again: the store's own `wait` prints warnings when it ends in vain."""
        while not self._values.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def tell(self, topic: Topic[T], value: T) -> None:
        """To all ranks; rank 0 alone may."""
        self._write(topic.name, value)

    def hear(self, topic: Topic[T]) -> T:
        """What rank 0 tells. Raises: MeetingFailed, also when it has gone or says nothing."""
        seconds = _ROUNDS_HEARD * self._seconds
        try:
            self._values.wait([topic.name], timedelta(seconds=seconds))
            return self._read(topic, topic.name, 0)
        except dist.DistError:
            raise self._failed(f"rank 0 has ended, or said nothing for {seconds:.0f} s") from None

    def _write(self, key: str, value: object) -> None:
        self._values.set(key, pack(key, value, self._secret))

    def _read(self, topic: Topic[T], key: str, rank: int) -> T:
        """`rank`: whose value it is to be."""
        try:
            return unpack(key, self._values.get(key), topic.shape, self._secret)
        except Refused as error:
            reason = f"what stands in rank {rank}'s name under {key} {error}"
            raise self._failed(f"{reason}; it is refused") from None

    def _failed(self, reason: str) -> MeetingFailed:
        return MeetingFailed(f"host {host_name()}, rank {self._place.rank}: {reason}")

    @contextmanager
    def last_word(self, ranks: Iterable[int]) -> Iterator[None]:
        """Once `ranks`, which came, have heard the verdict, rank 0 does what stands in the block; the others wait.

        A launcher may end all ranks with SIGTERM when the first leaves with an error. So rank 0 says why before any
        leaves, and from then on each leaves with its own code.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._gather(_HEARD, ranks)
        yield
        if self._place.rank == 0:
            self.tell(_END, None)
        with suppress(MeetingFailed, dist.DistError):  # rank 0 does not wait for long
            self.hear(_END)
            self._gather(_LEFT, ranks)

    def _gather(self, topic: Topic[None], ranks: Iterable[int]) -> None:
        """Rank 0, which keeps the store open, waits a little while for the others."""
        self.put(topic, None)
        if self._place.rank == 0:
            self.take(topic, ranks, min(self._seconds, _LEAVE_SECONDS))

    def measure_clock(self, rank: int) -> tuple[float, float] | None:
        """How far the clock of `rank` is ahead of this one, and the error, half a round trip; in seconds.

        `rank` must call `answer_clock`; None when it does not.
        """
        trips = []
        for round_index in range(_CLOCK_ROUNDS):
            asked = time.time()
            self.tell(_question(rank, round_index), None)
            answers = self.take(_clock(round_index), [rank], _CLOCK_SECONDS)
            heard = time.time()
            if rank not in answers:
                return None
            trips.append((answers[rank] - (asked + heard) / 2, (heard - asked) / 2))
        return min(trips, key=lambda trip: trip[1])

    def answer_clock(self) -> None:
        for round_index in range(_CLOCK_ROUNDS):
            self.hear(_question(self._place.rank, round_index))
            self.put(_clock(round_index), time.time())


def _question(rank: int, round_index: int) -> Topic[None]:
    return Topic(f"ask/{rank}/{round_index}", None)


def _clock(round_index: int) -> Topic[float]:
    return Topic(f"clock/{round_index}", float)


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
