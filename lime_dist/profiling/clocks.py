"""How far each rank's clock is ahead of rank 0's, from times that are exchanged over the world group. Collective: world.

Nobody leaves an all-reduce before all have entered it. So of each round a rank's leaving is behind rank 0's entering, and its
entering ahead of rank 0's leaving: two bounds for the offset of its clock, of which the tightest of all rounds are kept. They
are tight where one of the two is the last to enter, so ranks take turns in being late. Ranks that run under one kernel have
one clock.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from lime_dist.profiling.clock_offset import ClockOffset

_REPEATS = 6
_LATE_SECONDS = 0.0005  # far longer than an all-reduce of a number takes within a host


@dataclass(frozen=True)
class MonotonicClock:
    """This process's. identity: the same for processes that have the same clock."""

    now: Callable[[], int] = time.monotonic_ns
    identity: str = ""

    @classmethod
    def own(cls) -> MonotonicClock:
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(identity=f"{boot} {os.readlink('/proc/self/ns/time')}")
        except OSError:  # no Linux
            return cls(identity=str(uuid.uuid4()))


def measure_offset(device: torch.device, clock: MonotonicClock | None = None) -> ClockOffset:
    """Of this rank. clock: its own, if not given. Collective: world."""
    clock = clock or MonotonicClock.own()
    now, rank, world_size = clock.now, dist.get_rank(), dist.get_world_size()
    rounds = [
        _meet(device, now, is_late=(rank >> bit) % 2 == late)
        for _ in range(_REPEATS)
        for bit in range(max(1, (world_size - 1).bit_length()))
        for late in range(2)
    ]
    own = torch.tensor([*rounds, (_number_of(clock.identity), 0)], dtype=torch.int64, device=device)
    first = own.clone()
    dist.broadcast(first, 0)
    *own_rounds, (own_number, _) = own.tolist()
    *first_rounds, (first_number, _) = first.tolist()
    if own_number == first_number:
        return ClockOffset(now(), 0, 0)
    highest = min(left - first_entered for (_, left), (first_entered, _) in zip(own_rounds, first_rounds))
    lowest = max(entered - first_left for (entered, _), (_, first_left) in zip(own_rounds, first_rounds))
    return ClockOffset(now(), (highest + lowest) // 2, (highest - lowest + 1) // 2)


def _number_of(identity: str) -> int:
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "big")


def _meet(device: torch.device, now: Callable[[], int], *, is_late: bool) -> tuple[int, int]:
    """When this rank entered and left."""
    number = torch.zeros(1, device=device)
    if is_late:
        time.sleep(_LATE_SECONDS)
    entered = now()
    dist.all_reduce(number)
    number.item()  # on a GPU the host waits for it here
    return entered, now()
