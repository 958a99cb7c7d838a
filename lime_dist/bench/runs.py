"""Training runs side by side: what a pattern costs and loses, what a number format changes. Starts its own ranks.

Runs of one seed follow each other, so that a machine whose speed drifts does not favour a variant; times
are given as ratios to the first variant of the same seed.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.config import Config, load_config
from lime_dist.lifecycle.launcher import own_place
from lime_dist.lifecycle.local_ranks import run_local_ranks
from lime_dist.lifecycle.stopping import stop_request
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.preflight.input_files import check_files

_WARM_UP_STEPS = 5  # not timed


@dataclass(frozen=True)
class Outcome:
    """One run. losses: of every step; step_seconds: median after the first few."""

    losses: list[float]
    held_out_loss: float
    step_seconds: float


def pattern_table(path: Path, overrides: Sequence[str], patterns: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown: pattern -> tensors and bytes of the largest bundle, step time, held-out loss after equal tokens.

    `none` is the LLaMA twin. Differences are to the first pattern, of the same seed.
    """
    variants = {
        pattern: ("depth.router=none",) if pattern == "none" else (f"depth.pattern={pattern}",) for pattern in patterns
    }
    outcomes = run_variants(path, overrides, variants, seeds)
    rows = []
    for pattern, runs in outcomes.items():
        plan = _plan(path, (*overrides, *variants[pattern]))
        largest = max(plan.chunks, key=lambda chunk: chunk.sent_bytes)
        sent = largest.transfer.sent
        first = outcomes[patterns[0]]
        rows.append(
            (
                f"`{pattern}`",
                str(1 + len(sent.raw_entries) + len(sent.partial_sums)),
                f"{largest.sent_bytes / largest.shape.residual_bytes:.1f}" if largest.sent_bytes else "-",
                f"{statistics.median(run.step_seconds / base.step_seconds for run, base in zip(runs, first)):.2f}",
                _mean_and_deviation([run.held_out_loss for run in runs]),
                _mean_and_deviation(
                    [run.held_out_loss - base.held_out_loss for run, base in zip(runs, first)], sign="+"
                ),
            )
        )
    head = (
        "pattern",
        "tensors in the largest bundle",
        "its bytes / residual",
        "step time",
        "held-out loss",
        f"over {patterns[0]}",
    )
    return _markdown(head, rows)


def precision_table(path: Path, overrides: Sequence[str], seeds: Sequence[int], num_stages: int) -> str:
    """Markdown: distance of bf16 runs to the fp32 run of one process, step by step, for each way to cross stages."""
    stages = f"parallel.pp={num_stages}"
    variants = {
        "fp32, one process": ("parallel.pp=1", "run.dtype=fp32"),
        f"fp32, {num_stages} stages, least": (stages, "run.dtype=fp32", "depth.policy=least"),
        "bf16, one process": ("parallel.pp=1", "run.dtype=bf16"),
        f"bf16, {num_stages} stages, relay": (stages, "run.dtype=bf16", "depth.policy=relay"),
        f"bf16, {num_stages} stages, least": (stages, "run.dtype=bf16", "depth.policy=least"),
        f"bf16, {num_stages} stages, least, fp32 sums": (
            stages,
            "run.dtype=bf16",
            "depth.policy=least",
            "depth.partial_sum_dtype=fp32",
        ),
    }
    outcomes = run_variants(path, ("parallel.tp=1", *overrides), variants, seeds)
    reference = next(iter(outcomes.values()))
    rows = []
    for name, runs in outcomes.items():
        distances = [
            statistics.fmean(abs(a - b) for a, b in zip(run.losses, base.losses)) for run, base in zip(runs, reference)
        ]
        held_out = [run.held_out_loss - base.held_out_loss for run, base in zip(runs, reference)]
        rows.append((name, f"{statistics.fmean(distances):.1e}", _mean_and_deviation(held_out, sign="+")))
    return _markdown(("run", "mean distance of the loss to fp32", "held-out loss over fp32"), rows)


def run_variants(
    path: Path, overrides: Sequence[str], variants: Mapping[str, Sequence[str]], seeds: Sequence[int]
) -> dict[str, list[Outcome]]:
    """Train every variant with every seed; outcomes by variant, in the order of seeds.

    Runs are kept under the config's run.dir. Raises: what training raises.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in variants}
    total = len(variants) * len(seeds)
    for seed in seeds:
        for name, extra in variants.items():
            done = sum(map(len, outcomes.values()))
            print(f"run {done + 1} of {total}: {name}, seed {seed}", file=sys.stderr, flush=True)
            outcomes[name].append(_run(path, (*overrides, *extra), name, seed))
    return outcomes


def _plan(path: Path, overrides: Sequence[str]) -> RunPlan:
    return ready_plan(load_config(path, overrides))


def _run(path: Path, overrides: Sequence[str], name: str, seed: int) -> Outcome:
    base = load_config(path, overrides)
    folder = Path(base.run.dir) / "bench" / f"{_file_name(name)}-seed{seed}"
    own = (f"run.seed={seed}", f"run.dir={folder}", "checkpoint.resume=never", f"run.log_every={base.run.steps}")
    plan = _plan(path, (*overrides, *own))
    check_files(plan.config)
    metrics = folder / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    run_local_ranks(_train, plan, shared_import="lime_dist.training.run")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    return Outcome(
        losses=[record["loss"] for record in steps],
        held_out_loss=[record["eval_loss"] for record in records if "eval_loss" in record][-1],
        step_seconds=statistics.median(record["step_seconds"] for record in steps[_WARM_UP_STEPS:]),
    )


def _train(config: Config) -> None:
    stop_request()  # before the slow imports of a fresh interpreter
    from lime_dist.training.run import train

    train(plan_run(config), own_place())


def _file_name(name: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in name)


def _mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
