"""What a run tells: metrics.jsonl, TensorBoard and the progress line. Written by one rank; knows no model."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import indent
from types import MappingProxyType
from typing import Any

import numpy
from torch.utils.tensorboard import SummaryWriter

from lime_dist.checkpoint.safe_files import flush_to_disk
from lime_dist.errors import one_line
from lime_dist.formats import RECENT_STEPS, format_bytes, format_clock, format_si
from lime_dist.profiling.accounting import Account, account
from lime_dist.profiling.profile_files import ProfileError, read_profile
from lime_dist.profiling.timeline import read_timelines
from lime_dist.training.boards import Board, Boards
from lime_dist.training.peak_memory import PEAKS
from lime_dist.training.records import read_records
from lime_dist.training.spikes import SpikeEvent

MAX_WIDTH = 120  # of a progress line
NOTHING: Mapping[str, int] = MappingProxyType({})
CHARTED = (
    "loss", "grad_norm", "lr", "router_lr", "tokens_per_second", "tokens_seen", "mfu", "step_seconds", *PEAKS,
)  # fmt: skip


MARKS_AT_ONCE = 2_000_000  # some ten seconds


class Metrics:
    """Opens the run's folder for writing, dropping what came after `first_step` in a run that is resumed before it.

    peak_flops: operations a second that all devices of the run can do at most; None where that is not known.
    more_boards: to be drawn on as on TensorBoard. evaluated_step: the last one of which there is an evaluation.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        num_steps: int,
        log_every: int,
        peak_flops: float | None = None,
        more_boards: Sequence[Board] = (),
    ):
        self._path = run_dir / "metrics.jsonl"
        _drop_lines_after(self._path, first_step)
        self.evaluated_step = _last_evaluated(self._path)
        self._file = self._path.open("a", buffering=1)
        tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._board = Boards([tensorboard, *more_boards])
        self._num_steps, self._log_every, self._peak_flops = num_steps, log_every, peak_flops
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._dead_gradients = DeadGradients()

    def step(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        tokens_seen: int,
        model_flops: int,
        step_seconds: float,
        boundary_bytes: Sequence[int],
        router_lr: float | None = None,
        peak_memory: Mapping[str, int] = NOTHING,
        spikes: Mapping[str, int] = NOTHING,
    ) -> None:
        """Record step `step` (from 1).

        tokens, model_flops: of this step, over all replicas. tokens_seen: of all steps so far, those of earlier starts too.
        router_lr: of a model with routers. peak_memory: `StepResult.peak_bytes`, under its name. spikes: `SpikeState.counts`.
        """
        self._recent.append(step_seconds)
        record: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            **({} if router_lr is None else {"router_lr": router_lr}),
            "tokens_per_second": tokens / step_seconds,
            "tokens_seen": tokens_seen,
            "model_flops": model_flops,
            **self._utilization(model_flops, step_seconds),
            "step_seconds": step_seconds,
            "boundary_bytes": list(boundary_bytes),
            **peak_memory,
            **spikes,
        }
        self._write(record)
        if step % self._log_every == 0 or step == self._num_steps:
            print(self._progress(record), flush=True)
        if warning := self._dead_gradients.warning(step, grad_norm):
            print(f"lime-dist: {warning}", file=sys.stderr, flush=True)
        for name in CHARTED:
            if name in record:
                self._board.add_scalar(f"train/{name}", record[name], step)
        for boundary, count in enumerate(boundary_bytes):
            self._board.add_scalar(f"boundary_bytes/{boundary}-{boundary + 1}", count, step)

    def config(self, text: str, *, step: int) -> None:
        """The resolved config of what comes after `step`, in YAML."""
        self._board.add_text("config", indent(text, "    "), step)  # code, in Markdown

    def _utilization(self, model_flops: int, step_seconds: float) -> dict[str, float]:
        """Model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B), a fraction of 1."""
        return {} if self._peak_flops is None else {"mfu": model_flops / (step_seconds * self._peak_flops)}

    def spike(self, event: SpikeEvent) -> None:
        """What was done at a bad step. On its return it can be read, as a run may end here."""
        self._write(
            {
                "step": event.step,
                "spike": event.action,
                "bad_step": event.bad_step,
                "reason": event.reason,
                "skipped_steps": event.state.num_skipped,
                "returns": event.state.num_returns,
                "samples_passed_over": event.state.samples_passed_over,
            }
        )
        self._board.add_text("spikes", event.line, event.step)
        for name, count in event.state.counts.items():
            self._board.add_scalar(f"spikes/{name}", count, event.step)
        self._board.flush()
        print(event.line, flush=True)

    def evaluation(self, *, step: int, eval_loss: float, eval_seconds: float) -> None:
        self._write({"step": step, "eval_loss": eval_loss, "eval_seconds": eval_seconds})
        print(f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}  held-out loss {eval_loss:.4f}", flush=True)
        self._board.add_scalar("eval/loss", eval_loss, step)

    def saved(self, *, step: int, folder: Path, seconds: float, wait_seconds: float) -> None:
        """seconds: until it was whole. wait_seconds: of them, those that training waited."""
        self._write({"step": step, "save_seconds": seconds, "save_wait_seconds": wait_seconds})
        behind = f"; training waited {wait_seconds:.1f} s of them" if wait_seconds < seconds else ""
        print(f"saved {folder} in {seconds:.1f} s{behind}", flush=True)
        self._board.add_scalar("checkpoint/save_seconds", seconds, step)
        self._board.add_scalar("checkpoint/save_wait_seconds", wait_seconds, step)

    def profiled(self, folder: Path) -> None:
        """A profile is whole: its figures, step by step, where working them out does not hold up a run of many ranks."""
        try:
            profile = read_profile(folder)
        except ProfileError as error:  # a shared disk that lags must not end the run
            print(f"lime-dist: warning: {one_line(error)}", file=sys.stderr, flush=True)
            return
        if profile.num_marks <= MARKS_AT_ONCE:
            for index, timeline in enumerate(read_timelines(profile)):
                self._profiled_step(timeline.step, account(profile.only(index), [timeline]))
        print(f"profile {folder}; look at it with `lime-dist profile show {folder}`", flush=True)

    def _profiled_step(self, step: int, figures: Account) -> None:
        self._board.add_scalar("profile/bubble_share", figures.bubble_share, step)
        for boundary in figures.boundaries:
            name = f"{boundary.from_stage}-{boundary.to_stage}_{boundary.direction}"
            self._board.add_scalar(f"profile_exposed_ms/{name}", 1e3 * boundary.exposed, step)
            if boundary.bytes_per_second:  # else all arrived before they could be timed
                self._board.add_scalar(f"profile_bytes_per_second/{name}", boundary.bytes_per_second, step)

    def router_map(self, step: int, mean: numpy.ndarray) -> None:
        """mean |R| [readers, sources] as a picture in TensorBoard."""
        from lime_dist.analysis.figures import map_picture  # matplotlib, which most runs do without

        self._board.add_figure("routers/mean", map_picture(mean), step)

    def flush_to_disk(self) -> None:
        """On return what was recorded survives a power cut."""
        os.fsync(self._file.fileno())
        flush_to_disk(self._path.parent)  # the file itself may be new in it

    def close(self) -> None:
        self._file.close()
        self._board.close()

    def _write(self, record: dict[str, Any]) -> None:
        """With its time, in seconds since the epoch. JSON has no NaN and no infinity: such a value is null."""
        timed = {**record, "time": round(time.time(), 3)}
        finite = {key: value if is_finite(value) else None for key, value in timed.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def _progress(self, record: dict[str, Any]) -> str:
        step = record["step"]
        seconds_left = (self._num_steps - step) * sum(self._recent) / len(self._recent)
        before = [
            f"step {step:>{len(str(self._num_steps))}}/{self._num_steps}",
            f"loss {_fixed(record['loss'], 4)}",
            f"grad {_fixed(record['grad_norm'], 3)}",
            f"lr {record['lr']:.2e}",
            f"{format_si(record['tokens_per_second'])} tok/s",
            *([f"mfu {_fixed(100 * record['mfu'], 1)}%"] if "mfu" in record else []),
        ]
        behind = f"left {format_clock(seconds_left)}"
        lines = ["  ".join([*before, *sent, behind]) for sent in _sent(record["boundary_bytes"])]
        return next((line for line in lines if len(line) <= MAX_WIDTH), lines[-1])


def _fixed(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if value < 1000 or not math.isfinite(value) else f"{value:.{decimals - 1}e}"


def _sent(boundary_bytes: Sequence[int]) -> Iterator[list[str]]:
    """Over all boundaries and over the busiest, however many there are; then less, as a line may have no room for it.

    metrics.jsonl has each.
    """
    if boundary_bytes:
        most = max(boundary_bytes)
        busiest = boundary_bytes.index(most)
        sent = f"sent {_compact(sum(boundary_bytes))}"
        if len(boundary_bytes) > 1:
            yield [f"{sent}, most {busiest}>{busiest + 1} {_compact(most)}"]
        yield [sent]
    yield []


def _compact(count: int) -> str:
    """As other numbers of the progress line, without a space, of which there is little."""
    return format_bytes(count).replace(" ", "")


def _drop_lines_after(path: Path, step: int) -> None:
    """Keep what led to `step`; nothing led to a start from the beginning, whose first record is of step 0."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if step > 0 and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the line that a killed run was writing
    replacement = path.with_suffix(".tmp")
    with replacement.open("w") as file:
        file.write("".join(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(replacement, path)


def _last_evaluated(path: Path) -> int | None:
    return next((record["step"] for record in reversed(read_records(path)) if "eval_loss" in record), None)


def is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


class DeadGradients:
    """Notices a model that no longer learns: its gradients are zero step after step, while the loss stays finite."""

    STEPS = 5

    def __init__(self) -> None:
        self._count = 0

    def warning(self, step: int, grad_norm: float) -> str | None:
        """After update `step`: a line to print, once for each such stretch."""
        self._count = self._count + 1 if grad_norm < SMALLEST_NORM else 0
        if self._count != self.STEPS:
            return None
        return (
            f"warning: step {step}: the gradient norm has been 0 for {self.STEPS} steps, the model no longer learns; "
            "start again from an earlier checkpoint with a lower optim.lr"
        )


SMALLEST_NORM = 1e-12  # below it AdamW's eps of 1e-8 makes every update nothing


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
