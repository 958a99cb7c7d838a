"""The range of every number of a run's configuration. A key without one here fails a test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lime_dist.errors import shown

LARGEST_FLOAT = 1.7976931348623157e308
MAX_WORLD_SIZE = 1_000_000
MAX_MICROBATCHES = 8192


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a key may be, from `low` to `high`; `above` and `below`: without the end itself."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str | None:
        """What is wrong with `value`, to stand behind its key."""
        if not (value > self.low if self.above else value >= self.low):  # so that nan fails
            return f"{shown(value)} must be {'above' if self.above else 'at least'} {self.low:g}"
        if not (value < self.high if self.below else value <= self.high):
            return f"{shown(value)} must be {self._highest()}"
        return None

    def _highest(self) -> str:
        if self.high == LARGEST_FLOAT:
            return "a finite number"
        high = int(self.high) if self.high == int(self.high) else self.high
        return f"{'below' if self.below else 'at most'} {high}"


def _whole(low: int, high: int) -> Range:
    return Range(low=low, high=high)


def _from(low: float, high: float = LARGEST_FLOAT) -> Range:
    return Range(low=low, high=high)


def _above(low: float, high: float = LARGEST_FLOAT) -> Range:
    return Range(low=low, high=high, above=True)


_MONTH_SECONDS = 30 * 86400  # timers and gloo take no more than a few of these
# The upper ends are far above what anyone trains; they keep plans quick and numbers from overflowing.
RANGES: dict[str, Range] = {
    "model.num_layers": _whole(1, 512),
    "model.hidden_size": _whole(1, 2**20),
    "model.intermediate_size": _whole(1, 2**22),
    "model.num_heads": _whole(1, 2**16),
    "model.num_kv_heads": _whole(1, 2**16),
    "model.vocab_size": _whole(1, 2**24),
    "model.rope_theta": _above(0, 1e15),
    "model.rms_norm_eps": _above(0, 1),
    "depth.head_top_p": _above(0, 1),
    "parallel.tp": _whole(1, 1024),
    "parallel.pp": _whole(1, 512),
    "parallel.dp": _whole(1, MAX_WORLD_SIZE),
    "parallel.virtual_stages": _whole(1, 1024),
    "pipeline.num_microbatches": _whole(1, MAX_MICROBATCHES),
    "pipeline.warmup": _whole(1, 8192),
    "pipeline.min_message": _whole(0, 2**40),
    "pipeline.receives_ahead": _whole(1, 64),
    "pipeline.partition": _whole(1, 512),
    "pipeline.boundary_cost": _above(0, 1e9),
    "optim.lr": _from(0, 1e4),
    "optim.router_lr": _from(0, 1e4),
    "optim.betas": Range(low=0, high=1, below=True),
    "optim.eps": _from(0, 1),
    "optim.weight_decay": _from(0),
    "optim.max_grad_norm": _from(0),
    "optim.warmup_steps": _whole(0, 10**9),
    "optim.min_lr": _from(0, 1),
    "data.train.weight": _above(0, 1e9),
    "data.valid.weight": _above(0, 1e9),
    "data.valid_fraction": Range(low=0, high=1, below=True),
    "data.seq_length": _whole(1, 2**22),
    "data.global_batch_size": _whole(1, 2**22),
    "data.micro_batch_size": _whole(1, 2**22),
    "eval.every": _whole(0, 10**9),
    "eval.batches": _whole(1, 10**6),
    "checkpoint.every": _whole(0, 10**9),
    "checkpoint.keep": _whole(1, 10**6),
    "optim.decay_steps": _whole(1, 10**9),
    "optim.cooldown_steps": _whole(0, 10**9),
    "checkpoint.keep_every": _whole(0, 10**9),
    "spikes.loss_sigma": _above(0, 1e6),
    "spikes.grad_norm_sigma": _above(0, 1e6),
    "spikes.window": _whole(2, 10_000),
    "spikes.max_skips": _whole(0, 10_000),
    "spikes.max_returns": _whole(0, 10_000),
    "run.steps": _whole(1, 10**9),
    "run.seed": _whole(0, 2**32 - 1),
    "run.timeout_seconds": _from(1, _MONTH_SECONDS),
    "run.memory": _whole(1, 2**60),
    "run.peak_tflops": _above(0, 1e6),
    "run.log_every": _whole(1, 10**9),
    "profile.steps": _whole(1, 10**9),
    "analysis.every": _whole(0, 10**9),
}


def numbers_of(value: Any) -> list[float]:
    """The numbers of a key: itself, or those of its list."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, (int, float)) and not isinstance(item, bool)]
