"""`eval RUN` and `train RUN`: the run in that folder, over three stages, whatever its config.yaml says of folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lime_dist.checkpoint.reader import find_latest, step_of
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter

BASE = {
    "model": {"num_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96},
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 2},
    "optim": {"lr": 0.02, "router_lr": 0.3, "warmup_steps": 0, "lr_schedule": "constant"},
    "data": {"train": "train", "valid": "valid", "seq_length": 8, "global_batch_size": 4},
    "eval": {"batches": 2},
    "run": {"steps": 1, "device": "cpu", "timeout_seconds": 60},
}


def evaluated(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capfd.readouterr()
    assert main(["eval", *arguments]) == 0
    return json.loads(capfd.readouterr().out.splitlines()[-1])


def test_a_moved_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Where it lay there is another run now, and the checkpoint that it began from is there too."""
    monkeypatch.chdir(tmp_path)
    for name in ("train", "valid"):
        with IndexedWriter(Path(name), vocab_size=96) as writer:
            writer.add_document(np.minimum(np.random.default_rng(5).zipf(1.3, 2000), 95))
            writer.commit({"vocab_size": 96, "tokens": 2000})
    Path("run.yaml").write_text(yaml.safe_dump(BASE))
    assert main(["train", "run.yaml", "run.dir=old", "run.seed=7"]) == 0
    began = "checkpoint.resume=old/checkpoints/step_000001"
    assert main(["train", "run.yaml", "run.dir=run", "run.seed=7", began, "run.steps=3"]) == 0
    Path("run").rename("moved")
    shutil.copytree("old", "run")
    expected = evaluated(capfd, "run.yaml", "--checkpoint", "moved/checkpoints/step_000003", "run.seed=7")
    assert evaluated(capfd, "moved") == expected
    assert main(["train", "moved", "checkpoint.resume=auto", "run.steps=4"]) == 0
    assert [step_of(find_latest(Path(run, "checkpoints"))) for run in ("moved", "run", "old")] == [4, 1, 1]
