"""How far a rank's clock is ahead of rank 0's. Pure data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClockOffset:
    """at: on this rank's clock. ahead: what to subtract to be on rank 0's. error: at most, either way. All in ns."""

    at: int
    ahead: int
    error: int
