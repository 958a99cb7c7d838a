"""Small runs of three stages that save every step, to be disturbed, and what is compared of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import yaml

import lime_dist.training.run  # noqa: F401  (before ranks are forked: its imports take seconds)
from lime_dist.checkpoint.reader import CheckpointReader
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter

CONFIG = {
    "model": {"num_layers": 6, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96},
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 2},
    "optim": {"warmup_steps": 4},
    "data": {"train": "train", "seq_length": 8, "global_batch_size": 4},
    "checkpoint": {"every": 1},
    "run": {"device": "cpu", "timeout_seconds": 60},
}


def write_inputs(folder: Path) -> None:
    """run.yaml and its token file."""
    tokens = np.minimum(np.random.default_rng(5).zipf(1.3, 2000), 95)
    with IndexedWriter(folder / "train", vocab_size=96) as writer:
        writer.add_document(tokens)
        writer.commit({"vocab_size": 96, "tokens": len(tokens)})
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))


def start(run_dir: Path, log: Path, *overrides: str) -> BaseProcess:
    """`lime-dist train` as a process group of its own."""

    def command() -> None:
        os.setpgid(0, 0)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # What a test's runner has put in their places does not write to those descriptors.
        sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)
        os._exit(main(["train", "run.yaml", f"run.dir={run_dir}", *overrides]))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    os.setpgid(process.pid, process.pid)  # here too: it may be killed before it has come to that
    return process


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    CheckpointReader(checkpoint)  # raises where it is not whole
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


def losses(run_dir: Path) -> list[tuple[int, float]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"]) for record in records if "loss" in record]
