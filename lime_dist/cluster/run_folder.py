"""What a run's folder tells of its progress: config, newest steps and checkpoint. Reads only; needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_dist.checkpoint.reader import find_latest, step_of
from lime_dist.config import RUN_CONFIG, Config, load_config
from lime_dist.errors import ConfigError
from lime_dist.formats import RECENT_STEPS
from lime_dist.training.records import RECENT_BYTES, read_records


def find_config(run_dir: Path) -> Config:
    """The run's resolved config, or what was submitted. Raises: ConfigError where there is no run."""
    if not run_dir.is_dir():
        raise ConfigError(f"RUN: {run_dir} is no folder; name a run's folder (its run.dir)")
    for path in (run_dir / RUN_CONFIG, run_dir / "slurm" / RUN_CONFIG):
        if path.is_file():
            return load_config(path)
    raise ConfigError(
        f"RUN: {run_dir} holds no config.yaml, so no run has begun there; name a run's folder (its run.dir)"
    )


@dataclass(frozen=True, kw_only=True)
class Spikes:
    """Steps that went wrong. last: what was done about the newest one, where that is not long ago."""

    skipped_steps: int
    returns: int
    last: str | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The newest step that was written down; None of each before the first."""

    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None  # of the recent steps
    mfu: float | None = None  # likewise; None too where a device's peak is not known
    step_seconds: float | None = None  # likewise
    tokens_seen: int | None = None
    spikes: Spikes | None = None  # None: nothing has gone wrong


def read_progress(path: Path) -> Progress:
    """Of a metrics.jsonl."""
    records = read_records(path, RECENT_BYTES)
    spikes = _spikes_of(records)
    recent = [record for record in records if "loss" in record][-RECENT_STEPS:]
    if not recent:
        return Progress(spikes=spikes)
    last, seconds = recent[-1], [record["step_seconds"] for record in recent]
    return Progress(
        step=last["step"],
        loss=last["loss"],
        tokens_per_second=_over_time(recent, "tokens_per_second"),
        mfu=_over_time(recent, "mfu"),
        step_seconds=sum(seconds) / len(seconds),
        tokens_seen=last.get("tokens_seen"),
        spikes=spikes,
    )


def _spikes_of(records: Sequence[dict[str, Any]]) -> Spikes | None:
    """Every step has the counts once there are any."""
    counted = next((record for record in reversed(records) if "returns" in record), None)
    if counted is None:
        return None
    event = next((record for record in reversed(records) if "spike" in record), None)
    return Spikes(
        skipped_steps=counted["skipped_steps"], returns=counted["returns"], last=event and _describe_spike(event)
    )


def _describe_spike(event: dict[str, Any]) -> str:
    text = f"{event['spike']} at step {event['bad_step']}: {event['reason']}"
    return text if event["spike"] != "returned" else f"{text}; back to step {event['step']}"


def _over_time(records: Sequence[dict[str, Any]], rate: str) -> float | None:
    """The mean of a rate over the steps' time; None where a step has none."""
    if any(record.get(rate) is None for record in records):
        return None
    return sum(record[rate] * record["step_seconds"] for record in records) / sum(
        record["step_seconds"] for record in records
    )


@dataclass(frozen=True, kw_only=True)
class LastCheckpoint:
    step: int
    age_seconds: float


def read_last_checkpoint(run_dir: Path, now: float) -> LastCheckpoint | None:
    """The newest whole one; `now` in seconds since the epoch."""
    folder = find_latest(run_dir / "checkpoints")
    if folder is None:
        return None
    written = (folder / "meta.json").stat().st_mtime
    return LastCheckpoint(step=step_of(folder), age_seconds=max(0.0, now - written))
