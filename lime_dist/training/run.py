"""What a launched or local rank is asked to do: train, evaluate, profile. Collective: world."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lime_dist.backends.megatron import Groups
from lime_dist.checkpoint.edges import checkpoints_of, evaluated_checkpoint, evaluated_config
from lime_dist.checkpoint.full_disk import naming_full_disk
from lime_dist.checkpoint.loading import load_checkpoint
from lime_dist.errors import ConfigError
from lime_dist.lifecycle.ending import DONE, REQUEUE
from lime_dist.lifecycle.heartbeat import side_heartbeat_folder
from lime_dist.lifecycle.launcher import Place
from lime_dist.lifecycle.pulse import Pulse
from lime_dist.lifecycle.stopping import stop_request
from lime_dist.lifecycle.watchdog import Watchdog
from lime_dist.plan.run_plan import RunPlan
from lime_dist.profiling.links import measure_links
from lime_dist.profiling.profiler import Profiler
from lime_dist.training.batches import BatchReader
from lime_dist.training.held_out import evaluate_batches
from lime_dist.training.joint_stop import JointStop, Stopped, between_parts
from lime_dist.training.metrics import Stopwatch
from lime_dist.training.rank import Rank
from lime_dist.training.run_data import open_held_out_data, open_training_data
from lime_dist.training.startup import check_alike, decide_start, plan_of
from lime_dist.training.training_run import TrainingRun
from lime_dist.training.world import join_world


def train(plan: RunPlan, place: Place) -> int:
    """Train to `run.steps` on this rank, or until a signal asks to stop; returns the exit code (`lifecycle/ending.py`)."""
    config, request, pulse = plan.config, stop_request(), Pulse()
    full_disk = naming_full_disk(Path(config.run.dir), checkpoints_of(config))
    with Watchdog(config, place, pulse) as watchdog, full_disk:
        groups, device = join_world(config, place, compare=check_alike)
        code, reason = _train_or_stop(plan, groups, device, JointStop(request, device), pulse)
        watchdog.settle(code, reason)  # by every rank, as each node's launcher may have a file of its own
        pulse.beat("leave")
        pulse.finish()
        dist.barrier()
    return code


def _train_or_stop(
    plan: RunPlan, groups: Groups, device: torch.device, stop: JointStop, pulse: Pulse
) -> tuple[int, str]:
    try:
        return TrainingRun(plan, groups, device, stop, pulse).train()
    except Stopped as cause:
        return REQUEUE, f"{cause} before the first step"


def evaluate(plan: RunPlan, place: Place, checkpoint: Path | None = None) -> tuple[int, dict[str, Any] | None]:
    """Held-out loss of a checkpoint (default: what training would resume from): the exit code, and the report on rank 0.

    Raises: CheckpointError, ConfigError.
    """
    work = partial(_evaluate_checkpoint, plan, checkpoint)
    return _beside_training("eval", plan, place, work, "the evaluation was stopped")


Found = TypeVar("Found")


def _beside_training(
    command: str,
    plan: RunPlan,
    place: Place,
    work: Callable[[Groups, torch.device, JointStop, Pulse], Found],
    stopped: str,
) -> tuple[int, Found | None]:
    """`work` of a command that may run while the run is training: the exit code, and what it found."""
    config, request, pulse = plan.config, stop_request(), Pulse()
    found: tuple[int, Found | None]
    with Watchdog(config, place, pulse, side_heartbeat_folder(Path(config.run.dir), command)):
        groups, device = join_world(config, place, compare=check_alike)
        try:
            found = DONE, work(groups, device, JointStop(request, device), pulse)
        except Stopped as cause:
            if place.rank == 0:
                print(f"lime-dist: {cause}: {stopped}; start it again", file=sys.stderr, flush=True)
            found = REQUEUE, None
        pulse.beat("leave")
        pulse.finish()
        dist.barrier()
    return found


_UNRECORDED_STEPS = 3  # the first ones, which open connections and allocate


def profile(plan: RunPlan, place: Place, num_steps: int) -> tuple[int, str | None]:
    """Record `num_steps` steps from the initial weights, of which nothing but the profile is kept: the exit code, and its folder."""
    return _beside_training("profile", plan, place, partial(_record_steps, plan, num_steps), "no profile was made")


def _record_steps(
    plan: RunPlan, num_steps: int, groups: Groups, device: torch.device, stop: JointStop, pulse: Pulse
) -> str | None:
    """Raises: Stopped."""
    between = between_parts(stop, pulse)
    samples, rank = open_training_data(plan.config, between), Rank(plan, groups, device, pulse)
    samples.prepare(0, between)
    first, last = _UNRECORDED_STEPS + 1, _UNRECORDED_STEPS + num_steps
    profiler = Profiler(rank, first=first, last=last, links=measure_links(groups, plan, device))
    size, watch, folder = plan.config.data.global_batch_size, Stopwatch(), None
    with BatchReader(samples.batch, rank.rows(), size, last * size, samples.num_targets) as batches:
        for step in range(1, last + 1):
            between()
            pulse.begin_step(step)
            watch.lap()
            profiler.begin(step)
            rank.train_step(batches.batch((step - 1) * size), lr_factor=0.0)
            folder = profiler.end()
            if rank.is_logger:
                print(f"step {step}/{last}  {watch.lap():.3f} s", file=sys.stderr, flush=True)
    return str(folder) if rank.is_logger else None


def _evaluate_checkpoint(
    plan: RunPlan, checkpoint: Path | None, groups: Groups, device: torch.device, stop: JointStop, pulse: Pulse
) -> dict[str, Any] | None:
    config = plan.config
    held_out = open_held_out_data(config, between_parts(stop, pulse))
    if held_out is None:
        raise ConfigError("data.valid: no held-out text; name a token file there or set data.valid_fraction")
    start = decide_start(config, device, lambda: evaluated_checkpoint(config, checkpoint), evaluated_config)
    assert start.folder is not None
    rank = Rank(plan_of(start.config, plan), groups, device, pulse)
    meta = load_checkpoint(rank, start.folder)
    loss = evaluate_batches(rank, held_out, stop)
    if loss is None:
        raise Stopped(stop.cause)
    if not rank.is_logger:
        return None
    return {"checkpoint": str(start.folder), "step": meta.step, "eval_loss": loss, "perplexity": math.exp(loss)}
