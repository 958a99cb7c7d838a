"""`lime-dist train` and `preflight` on local ranks with a GPU each, as a user starts them. Has not run on GPUs yet.

The words of a layout are those of `common.SHORT`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from common import overrides
from fresh_ranks import on_cpu, on_gpu
from test_train import BASE

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.checkpoint.reader import find_latest, read_meta
from lime_dist.config import load_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.plan.run_plan import plan_run

# Six updates at large rates enlarge what kernels sum otherwise; a batch, a moment or a rate that is lost shows at 1e-2.
TOLERANCE = 1e-3
CONSTANT = "optim.lr_schedule=constant"  # so that a run may go on to more steps


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = np.random.default_rng(5)
    for name in ("train", "valid"):
        with IndexedWriter(tmp_path / name, vocab_size=96) as writer:
            writer.add_document(generator.integers(0, 96, 2000))
            writer.commit({"vocab_size": 96, "tokens": 2000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lime_dist(command: str, text: str, *more: str) -> str:
    """The output of a command that ends well. In a process of its own: this one leaves CUDA alone."""
    ended = subprocess.run(
        [sys.executable, "-m", "lime_dist.cli", command, "run.yaml", *overrides(text), *more],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def steps_of(run_dir: str) -> list[dict]:
    records = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss" in record]


@pytest.mark.parametrize(
    ("text", "device"),
    [
        *on_gpu("zero=1", "pp=2 zero=1", "tp=2 sp zero=0", "dp=2 zero=3", "pp=2 v=2 zero=1", "pp=2 tp=2 dp=2 zero=1"),
        on_cpu("pp=2 zero=1"),
    ],
)
def test_the_first_steps_of_a_run_that_goes_on_once(text: str, device: str) -> None:
    lime_dist("train", "", "run.dir=expected", "run.device=cpu", "run.steps=6", CONSTANT)
    lime_dist("train", text, "run.dir=run", f"run.device={device}", "run.steps=3", CONSTANT)
    lime_dist("train", text, "run.dir=run", f"run.device={device}", "run.steps=6", CONSTANT)
    expected, found = steps_of("expected"), steps_of("run")
    assert [step["step"] for step in found] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=TOLERANCE)
    config = ready_plan(load_config(Path("run/config.yaml"), [])).config
    planned = [config.num_microbatches * count for count in plan_run(config).boundary_bytes]
    assert all(step["boundary_bytes"] == planned for step in found)
    checkpoint = find_latest(Path("run/checkpoints"))
    assert checkpoint is not None and read_meta(checkpoint).step == 6


@pytest.mark.parametrize(("text", "device"), [*on_gpu("", "pp=2", "pp=4 tp=2"), on_cpu("pp=2")])
def test_preflight_passes_and_measures_each_boundary(text: str, device: str) -> None:
    report = json.loads(lime_dist("preflight", text, f"run.device={device}", "--json"))
    assert report["passed"] and report["bad"] == {}
    assert len(report["boundaries"]) == plan_boundaries(text)


def plan_boundaries(text: str) -> int:
    return max((int(word.removeprefix("pp=")) for word in text.split() if word.startswith("pp=")), default=1) - 1
