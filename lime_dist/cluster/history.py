"""RUN/slurm/history.tsv: what happened to a run on SLURM. The job script appends `start` and `end`, submit `submitted`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line. step: of the newest complete checkpoint then, 0 for none; restart: None at a submission."""

    time: str  # UTC, 2026-01-31T12:00:00Z
    job: str
    restart: int | None
    kind: str  # submitted | start | successor (detail: its job) | end
    step: int
    detail: str


def read_history(path: Path) -> list[Event]:
    """Oldest first; none when there is no file. A line that was cut short is left out."""
    if not path.is_file():
        return []
    events = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [event for event in events if event is not None]


def _parse(line: str) -> Event | None:
    try:
        time, job, restart, kind, step, detail = line.split("\t")
        return Event(
            time=time,
            job=job,
            restart=int(restart) if restart != "-" else None,
            kind=kind,
            step=int(step),
            detail=detail,
        )
    except ValueError:
        return None


def append_submitted(path: Path, job: str, step: int, detail: str = "") -> None:
    time = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{time}\t{job}\t-\tsubmitted\t{step}\t{detail}\n")
