"""`lime-dist bench checkpoint`: how long training stands still for a save, against a step, a save at once, and `torch.save`.

The ways take turns, so that a machine whose speed drifts favours none; figures are those of the slowest rank. Starts its own ranks.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lime_dist.checkpoint.loading import read_shares
from lime_dist.checkpoint.reader import step_folder
from lime_dist.checkpoint.safe_files import flush_to_disk
from lime_dist.checkpoint.saved_weights import SavedWeights
from lime_dist.checkpoint.saving import Progress, Saver
from lime_dist.checkpoint.staging import stage
from lime_dist.config import Config, check_config, parse_config
from lime_dist.formats import format_bytes, format_si
from lime_dist.lifecycle.launcher import own_place
from lime_dist.lifecycle.local_ranks import run_local_ranks
from lime_dist.plan.parameters import total_parameters
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.tensors import KINDS
from lime_dist.training.agreement import gather
from lime_dist.training.rank import Rank
from lime_dist.training.world import join_world, open_writers_group

_LAYERS, _VOCABULARY, _TOKENS = 12, 1024, 128
_SAMPLES = 6  # of a replica and step, one a microbatch
_WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Medians over the rounds, in seconds, of the slowest rank; bytes of the rank with the most.

    step_beside: a step while a thread writes. at_once: a save that training waits for. waited, written: one behind training,
    until training goes on and until it is whole. first_waited: of the first of these, which makes its memory. torch_save: of
    the same tensors into one file a rank, flushed to the disk too. load: reading and verifying.
    """

    parameters: int
    step: float
    step_beside: float
    at_once: float
    waited: float
    first_waited: float
    written: float
    torch_save: float
    load: float
    bytes_written: int
    bytes_read: int


def run_checkpoints(sizes: Sequence[int], overrides: Sequence[str], rounds: int, folder: Path) -> list[Measured]:
    """sizes: parameters of the models, about. folder: where checkpoints are written, and removed again."""
    found = []
    for size in sizes:
        config = _config(size, overrides, folder)
        print(f"{format_si(total_parameters(config.model, config.pattern))} parameters", file=sys.stderr, flush=True)
        try:
            of_ranks = run_local_ranks(_measure, plan_run(config), rounds, shared_import="lime_dist.training.run")
        finally:
            shutil.rmtree(_working_folder(config), ignore_errors=True)
        slowest = {name: max(one[name] for one in of_ranks) for name in of_ranks[0]}
        found.append(Measured(parameters=total_parameters(config.model, config.pattern), **slowest))
    return found


def _config(size: int, overrides: Sequence[str], folder: Path) -> Config:
    """A layer has 12 squares of the hidden size."""
    hidden = max(64, 64 * round(math.sqrt(size / (12 * _LAYERS)) / 64))
    values = {
        "model": {
            "num_layers": _LAYERS,
            "hidden_size": hidden,
            "intermediate_size": hidden * 8 // 3,
            "num_heads": hidden // 64,
            "vocab_size": _VOCABULARY,
        },
        "parallel": {"pp": 3},
        "pipeline": {"num_microbatches": _SAMPLES},
        "data": {"seq_length": _TOKENS},
        "checkpoint": {"asynchronous": True, "keep": 1},
        "run": {"dir": str(folder)},
    }
    samples = _SAMPLES * parse_config(values, overrides).layout.dp
    config = parse_config(values, [*overrides, f"data.global_batch_size={samples}"])
    return check_config(config, config.layout.world_size)


def _working_folder(config: Config) -> Path:
    return Path(config.run.dir) / "bench-checkpoint"


def _measure(config: Config, rounds: int) -> dict[str, float]:
    """On one rank."""
    groups, device = join_world(config, own_place())
    bench = _Bench(Rank(plan_run(config), groups, device), open_writers_group(config))
    return bench.measure(rounds)


class _Bench:
    """One rank's part. Collective: every method, world."""

    def __init__(self, rank: Rank, writers: dist.ProcessGroup):
        self._rank, self._folder = rank, _working_folder(rank.config)
        self._saver = Saver(self._folder / "checkpoints", writers=writers)
        generator = torch.Generator().manual_seed(1)
        self._batch = torch.randint(_VOCABULARY, (rank.config.data.global_batch_size, _TOKENS + 1), generator=generator)
        self._saves = 0
        self._beside: list[float] = []
        self._waited: list[float] = []

    def measure(self, rounds: int) -> dict[str, float]:
        for _ in range(_WARM_UP_STEPS):
            self._step()
        ways: dict[str, Callable[[], float]] = {
            "step": self._step,
            "at_once": self._save_at_once,
            "written": self._save_behind,
            "torch_save": self._torch_save,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(1, rounds + 1):
            self._say(f"round {number} of {rounds}")
            for name, way in ways.items():
                seconds[name].append(way())
        first, *later = self._waited
        load, bytes_read = self._load()
        return {
            **{name: statistics.median(found) for name, found in seconds.items()},
            "step_beside": statistics.median(self._beside),
            "waited": statistics.median(later or [first]),
            "first_waited": first,
            "load": load,
            "bytes_read": bytes_read,
            "bytes_written": 4 * sum(one.values.numel() for one in stage(self._rank)),
        }

    def _say(self, what: str) -> None:
        if self._rank.is_logger:
            print(what, file=sys.stderr, flush=True)

    def _step(self) -> float:
        return self._timed(lambda: self._rank.train_step(self._batch, lr_factor=1.0))

    def _timed(self, work: Callable[[], Any]) -> float:
        dist.barrier()
        start = time.perf_counter()
        work()
        if self._rank.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _save_at_once(self) -> float:
        return self._timed(lambda: self._save(behind=False))

    def _save(self, *, behind: bool) -> None:
        self._saves += 1
        self._saver.save(self._rank, Progress(self._saves, self._saves), behind=behind)

    def _save_behind(self) -> float:
        """Seconds until it is whole."""
        self._waited.append(self._timed(lambda: self._save(behind=True)))
        self._beside.append(self._step())
        while not self._is_written():
            self._beside.append(self._step())
        self._saver.settle(self._rank.pulse)
        *_, saved = self._saver.take_saved()
        return saved.seconds

    def _is_written(self) -> bool:
        """On all ranks."""
        return all(gather(self._saver.is_idle, self._rank.device))

    def _torch_save(self) -> float:
        path = self._folder / f"{dist.get_rank()}.pt"
        tensors = {f"{one.kind}:{one.share.spec.name}": one.values.clone() for one in stage(self._rank)}

        def work() -> None:
            torch.save(tensors, path)
            flush_to_disk(path)
            dist.barrier()

        seconds = self._timed(work)
        os.unlink(path)
        return seconds

    def _load(self) -> tuple[float, int]:
        saved = SavedWeights(step_folder(self._folder / "checkpoints", self._saves), self._rank.config)
        return self._timed(lambda: read_shares(self._rank, saved, KINDS)), saved.bytes_read


def checkpoint_table(found: Sequence[Measured]) -> str:
    """Markdown: a row a model; ratios with the figures behind them."""
    head = (
        "parameters",
        "bytes a rank, written / read",
        "step",
        "save at once : step",
        "training waits, behind : at once (the first)",
        "step beside a write : step",
        "whole after, behind : at once",
        "save at once : `torch.save`",
        "load : save at once",
    )
    rows = [
        (
            format_si(one.parameters),
            f"{format_bytes(one.bytes_written)} / {format_bytes(one.bytes_read)}",
            f"{one.step:.2f} s",
            f"{one.at_once / one.step:.2f}, {one.at_once:.2f} s",
            f"**{one.waited / one.at_once:.3f}** ({one.first_waited / one.at_once:.2f}), {one.waited:.3f} s",
            f"{one.step_beside / one.step:.2f}",
            f"{one.written / one.at_once:.2f}, {one.written:.2f} s",
            f"{one.at_once / one.torch_save:.2f}, {one.torch_save:.2f} s",
            f"{one.load / one.at_once:.2f}, {one.load:.2f} s",
        )
        for one in found
    ]
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
