"""`lime-dist status`: what a run does now, from its folder and from SLURM, as text or JSON. Changes nothing. No torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lime_dist.cluster.history import Event, read_history
from lime_dist.cluster.queue import Job, find_job
from lime_dist.cluster.run_folder import (
    LastCheckpoint,
    Progress,
    Spikes,
    find_config,
    read_last_checkpoint,
    read_progress,
)
from lime_dist.cluster.starts import Start, find_successor, last_job, last_start_time, list_starts
from lime_dist.formats import format_clock, format_si
from lime_dist.layout import Layout
from lime_dist.lifecycle.heartbeat import Heartbeat, heartbeat_folder, read_heartbeats, written_since
from lime_dist.lifecycle.silence import describe_silence, is_stale

SILENT_SECONDS = 30.0  # without a heartbeat; they come once a second, and network disks show them late
_SHOWN = 8  # silent ranks, of however many


@dataclass(frozen=True, kw_only=True)
class Pulses:
    """The heartbeats of the present start."""

    ranks: int  # that have written one
    world_size: int
    oldest_rank: int | None
    oldest_seconds: float | None
    silent: list[str]  # a line on each rank that writes no more while others do, or all if all are silent


@dataclass(frozen=True, kw_only=True)
class Status:
    run: str
    state: str  # SLURM's word for the job; without one: not started, running, silent or ended
    job: Job | None
    job_id: str | None  # also where SLURM knows nothing of it
    step: int
    num_steps: int
    loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    tokens_seen: int | None
    spikes: Spikes | None  # None: no step has gone wrong
    seconds_left: float | None  # of the training, at the pace of the recent steps
    checkpoint: LastCheckpoint | None
    restarts: int  # since the last submission
    starts: list[Start]
    heartbeats: Pulses


def read_status(run_dir: Path, now: float | None = None) -> Status:
    """Raises: ConfigError where there is no run."""
    now = time.time() if now is None else now
    config = find_config(run_dir)
    events = read_history(run_dir / "slurm" / "history.tsv")
    job_id = last_job(events)
    job = _find_present_job(events, job_id) if job_id else None
    beats = read_heartbeats(heartbeat_folder(run_dir), config.layout.world_size)
    beats = written_since(beats, last_start_time(events) or 0.0)
    is_running = job.is_running if job is not None else _state_of(beats, now) == "running"
    checkpoint = read_last_checkpoint(run_dir, now)
    history = list_starts(events, still_running=is_running, newest_step=checkpoint.step if checkpoint else 0)
    progress = read_progress(run_dir / "metrics.jsonl")
    return Status(
        run=str(run_dir),
        state=job.state if job is not None else _state_of(beats, now),
        job=job,
        job_id=job_id,
        step=progress.step,
        num_steps=config.run.steps,
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second,
        mfu=progress.mfu,
        tokens_seen=progress.tokens_seen,
        spikes=progress.spikes,
        seconds_left=_seconds_left(progress, config.run.steps),
        checkpoint=checkpoint,
        restarts=max(0, len(history) - 1),
        starts=history,
        heartbeats=_pulses(config.layout, beats, now, is_over=job is not None and not job.is_running),
    )


def _find_present_job(events: Sequence[Event], job_id: str) -> Job | None:
    """The job, or the successor that goes on with the run when the job is over."""
    job, successor = find_job(job_id), find_successor(events, job_id)
    if successor is None or (job is not None and not job.is_over):
        return job
    following = find_job(successor)
    return job if following is None or following.is_over else following


def _seconds_left(progress: Progress, num_steps: int) -> float | None:
    return None if progress.step_seconds is None else max(0, num_steps - progress.step) * progress.step_seconds


# ---- heartbeats


def _state_of(beats: Sequence[Heartbeat | None], now: float) -> str:
    known = [beat for beat in beats if beat is not None]
    if not known:
        return "not started"
    if all(beat.ended for beat in known):
        return "ended"
    return "silent" if all(is_stale(beat, now, SILENT_SECONDS) for beat in known) else "running"


def _pulses(layout: Layout, beats: Sequence[Heartbeat | None], now: float, is_over: bool) -> Pulses:
    known = [beat for beat in beats if beat is not None]
    oldest = min(known, key=lambda beat: beat.alive, default=None)
    is_over = is_over or all(beat.ended for beat in known)
    silent = [] if is_over else [beat.global_rank for beat in known if is_stale(beat, now, SILENT_SECONDS)]
    return Pulses(
        ranks=len(known),
        world_size=layout.world_size,
        oldest_rank=oldest.global_rank if oldest else None,
        oldest_seconds=max(0.0, now - oldest.alive) if oldest else None,
        silent=[describe_silence(layout, beats, rank, now, SILENT_SECONDS) for rank in silent],
    )


# ---- showing


def to_text(status: Status) -> str:
    rows = [
        ("run", status.run),
        ("state", _state_line(status)),
        ("step", _step_line(status)),
        *(("spikes", line) for line in _spike_lines(status.spikes)),
        ("checkpoint", _checkpoint_line(status.checkpoint)),
        ("time left", _time_left_line(status)),
        ("heartbeats", _heartbeat_line(status.heartbeats)),
        *(("silent", line) for line in _shortened(status.heartbeats.silent)),
        ("restarts", f"{status.restarts} since the submission"),
        *(("", f"{start.time}  job {start.job}.{start.restart}  {_ending(start)}") for start in status.starts),
    ]
    return "\n".join(f"{name:<10}  {text}".rstrip() for name, text in rows)


def _state_line(status: Status) -> str:
    if status.job is None:
        return status.state + (f" (SLURM does not answer for job {status.job_id})" if status.job_id else "")
    job = status.job
    nodes = f" on {job.nodes}" if job.nodes else ""
    return f"{job.state}, job {job.job_id}{nodes}" + (f" ({job.reason})" if job.reason else "")


def _step_line(status: Status) -> str:
    parts = [f"{status.step} of {status.num_steps}"]
    if status.loss is not None and status.tokens_per_second is not None:
        parts += [f"loss {status.loss:.4f}", f"{format_si(status.tokens_per_second)} tokens/s"]
    if status.mfu is not None:
        parts.append(f"mfu {100 * status.mfu:.1f}%")
    if status.tokens_seen is not None:
        parts.append(f"{format_si(status.tokens_seen)} tokens seen")
    return "  ".join(parts)


def _spike_lines(spikes: Spikes | None) -> list[str]:
    if spikes is None:
        return []
    steps = f"{spikes.skipped_steps} step" + ("" if spikes.skipped_steps == 1 else "s")
    times = f"{spikes.returns} time" + ("" if spikes.returns == 1 else "s")
    return [f"{steps} skipped, went back {times}", *filter(None, [spikes.last])]


def _checkpoint_line(checkpoint: LastCheckpoint | None) -> str:
    if checkpoint is None:
        return "none yet"
    return f"step {checkpoint.step}, {format_clock(checkpoint.age_seconds)} ago"


def _time_left_line(status: Status) -> str:
    of_training = "unknown" if status.seconds_left is None else format_clock(status.seconds_left)
    of_job = status.job.seconds_left if status.job is not None else None
    if status.job is not None and not status.job.is_running:
        return f"training {of_training}, once it runs"
    return f"training {of_training}" + (f", job {format_clock(of_job)}" if of_job is not None else "")


def _heartbeat_line(pulses: Pulses) -> str:
    if pulses.oldest_seconds is None:
        return f"none of {pulses.world_size} ranks yet (before it trains, a start checks hosts: see `logs --script`)"
    return f"{pulses.ranks} of {pulses.world_size} ranks, oldest {pulses.oldest_seconds:.0f} s ago (rank {pulses.oldest_rank})"


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]


def _ending(start: Start) -> str:
    return f"on {start.nodes}: " + ("running" if start.ending is None else f"at step {start.last_step}: {start.ending}")
