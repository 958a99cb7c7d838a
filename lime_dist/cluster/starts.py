"""A run's starts and how each of them ended, from its history. Pure; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from lime_dist.cluster.history import Event

UNRECORDED_END = "killed: node failure or preemption"  # nothing was left of the script to write it down


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start since the last submission."""

    job: str
    restart: int
    time: str  # UTC, 2026-01-31T12:00:00Z
    nodes: str
    ending: str | None  # `CODE REASON -> DECISION`; None while it runs
    last_step: int  # of the newest checkpoint behind it


def last_job(events: Sequence[Event]) -> str | None:
    return next((event.job for event in reversed(events) if event.job.isdigit()), None)


def list_starts(events: Sequence[Event], *, still_running: bool, newest_step: int) -> list[Start]:
    """Since the last submission, oldest first. One without an end was killed, but for the last if it still runs.

    newest_step: of the run's newest checkpoint. A start's last save may come behind its `end` line, which is written when SLURM
    asks it to end; so the next start tells how far it came.
    """
    ends = {(event.job, event.restart): event for event in events if event.kind == "end"}
    begun = _begun(events)
    reached = [*(event.step for event in begun[1:]), newest_step]
    return [
        _start(event, ends.get((event.job, event.restart)), step, running=still_running and event is begun[-1])
        for event, step in zip(begun, reached)
    ]


def find_successor(events: Sequence[Event], job: str) -> str | None:
    """The job that waits for the end of `job`, where jobs may not requeue themselves."""
    return next((event.detail for event in reversed(events) if event.kind == "successor" and event.job == job), None)


def last_start_time(events: Sequence[Event]) -> float | None:
    """Seconds since the epoch."""
    begun = _begun(events)
    return datetime.fromisoformat(begun[-1].time.replace("Z", "+00:00")).timestamp() if begun else None


def _begun(events: Sequence[Event]) -> list[Event]:
    submissions = [index for index, event in enumerate(events) if event.kind == "submitted"]
    return [event for event in events[submissions[-1] if submissions else 0 :] if event.kind == "start"]


def _start(event: Event, end: Event | None, last_step: int, running: bool) -> Start:
    return Start(
        job=event.job,
        restart=event.restart or 0,
        time=event.time,
        nodes=event.detail,
        ending=end.detail if end is not None else None if running else UNRECORDED_END,
        last_step=last_step,
    )
