"""RUN/slurm/history.tsv: the run's starts and how they ended. Reads only: submit and the job's script append to it. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

UNRECORDED_END = "killed: node failure or preemption"  # nothing was left of the script to write it down


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line."""

    time: datetime
    job: str
    restart: str  # a number, or - of a submission
    name: str  # submitted | start | end
    step: int  # of the newest complete checkpoint then
    detail: str


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start since the last submission."""

    job: str
    restart: int
    time: datetime
    nodes: str
    ending: str | None  # `CODE REASON -> DECISION`; None while it runs
    last_step: int  # of the newest checkpoint when it ended, else when it began


def read_history(path: Path) -> list[Event]:
    """Empty where there is no file; a line that is not whole is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [event for line in lines if (event := _event(line)) is not None]


def _event(line: str) -> Event | None:
    try:
        time, job, restart, name, step, detail = line.split("\t")
        when = datetime.strptime(time, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
        return Event(time=when, job=job, restart=restart, name=name, step=int(step), detail=detail)
    except ValueError:
        return None


def last_job(events: Sequence[Event]) -> str | None:
    return next((event.job for event in reversed(events) if event.job.isdigit()), None)


def begun(events: Sequence[Event]) -> list[Event]:
    """The starts since the last submission, oldest first."""
    submissions = [index for index, event in enumerate(events) if event.name == "submitted"]
    recent = events[submissions[-1] :] if submissions else events
    return [event for event in recent if event.name == "start" and event.restart.isdigit()]


def starts(events: Sequence[Event], still_running: bool) -> list[Start]:
    """Since the last submission. A start without an end is one that was killed, but for the last if it still runs."""
    ends = {(event.job, event.restart): event for event in events if event.name == "end"}
    recent = begun(events)
    return [
        _start(event, ends.get((event.job, event.restart)), running=still_running and event is recent[-1])
        for event in recent
    ]


def _start(event: Event, end: Event | None, running: bool) -> Start:
    return Start(
        job=event.job,
        restart=int(event.restart),
        time=event.time,
        nodes=event.detail,
        ending=end.detail if end is not None else None if running else UNRECORDED_END,
        last_step=end.step if end is not None else event.step,
    )
