"""Folders of runs as training leaves them: a resolved config, and metrics of losses that are given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lime_dist.config import Config, check_config, dump_yaml, parse_config
from lime_dist.plan.run_plan import plan_run

BASE: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 96},
    "optim": {"warmup_steps": 2},
    "data": {"train": "train", "valid": "valid", "seq_length": 12, "global_batch_size": 12},
    "eval": {"every": 10, "batches": 2},
    "run": {"steps": 40},
}  # fmt: skip
LLAMA = "depth.router=none"


def write_run(
    folder: Path,
    *overrides: str,
    loss: Callable[[int], float] = lambda step: 4.0 - 0.05 * step,
    evaluations: Mapping[int, float] | None = None,
    num_steps: int | None = None,
) -> Path:
    """loss: of each step. evaluations: held-out loss by step. num_steps: where the run has got to (default: its end)."""
    config = check_config(parse_config(BASE, [*overrides, f"run.dir={folder}"]))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(config))
    write_metrics(folder, config, loss, evaluations or {}, config.run.steps if num_steps is None else num_steps)
    return folder


def write_metrics(
    folder: Path, config: Config, loss: Callable[[int], float], evaluations: Mapping[int, float], num_steps: int
) -> None:
    plan, lines = plan_run(config), []
    for step in range(num_steps + 1):
        if step > 0:
            tokens = config.tokens_per_step
            lines += [
                {
                    "step": step,
                    "loss": loss(step),
                    "grad_norm": 0.5,
                    "lr": 1e-3,
                    "tokens_per_second": float(tokens),
                    "tokens_seen": step * tokens,
                    "model_flops": plan.model_flops_per_step,
                    "step_seconds": 1.0,
                    "boundary_bytes": [],
                }
            ]
        if step in evaluations:
            lines += [{"step": step, "eval_loss": evaluations[step], "eval_seconds": 0.1}]
    lines += [{"step": num_steps, "save_seconds": 0.1}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
