"""A small training that is slow enough to be hit while it runs, and what it leaves. Knows nothing of SLURM."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml

from lime_dist.data.indexed import IndexedWriter

STEPS = 60
TP2_PP2 = ("parallel.tp=2", "parallel.pp=2")
PP3 = ("parallel.pp=3",)
# Rates are large and eps lies above most gradients, so that losses move visibly and a lost or repeated batch shows.
CONFIG = {
    "model": {
        "num_layers": 6, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2,
        "vocab_size": 96,
    },
    "pipeline": {"num_microbatches": 4},
    "optim": {"lr": 0.01, "router_lr": 0.05, "eps": 1e-3, "max_grad_norm": 0.5, "warmup_steps": 2},
    "data": {"train": "train", "seq_length": 32, "global_batch_size": 16},
    "checkpoint": {"every": 10, "keep": 9},
    "run": {"device": "cpu", "log_every": 20, "steps": STEPS, "timeout_seconds": 60},
}  # fmt: skip


def write_training(folder: Path) -> None:
    """run.yaml and the token file that it reads, by names relative to `folder`."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(5)
    # A Zipf-like text: its loss falls.
    documents = [np.minimum(generator.zipf(1.3, generator.integers(200, 600)), 95) for _ in range(120)]
    with IndexedWriter(folder / "train", vocab_size=96) as writer:
        for document in documents:
            writer.add_document(document)
        writer.commit({"vocab_size": 96, "tokens": sum(map(len, documents))})
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))


def curve(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of every line of metrics.jsonl that has a loss, in the order of the file."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    whole = path.read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in whole if line.endswith("\n")]  # the last one may be half written
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def steps_done(run_dir: Path) -> int:
    return curve(run_dir)[-1][0] if curve(run_dir) else 0
