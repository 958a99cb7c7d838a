"""A synthetic task from files to accuracy: layouts train alike on whole documents, and any layout's checkpoint is judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lime_dist.cli.command_line import main
from lime_dist.data.tasks.arithmetic import Arithmetic
from lime_dist.data.tasks.build import build_task

BASE = {
    "model": {
        "num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 277,
    },
    "pipeline": {"num_microbatches": 2},
    "optim": {"lr": 0.01, "warmup_steps": 0},
    "data": {
        "train": "task/train", "valid": "task/valid", "tokenizer": "task/tokenizer.model", "seq_length": 24, "global_batch_size": 8,
    },
    "run": {"device": "cpu", "steps": 4, "timeout_seconds": 60},
}  # fmt: skip
# fp32, four steps: layouts differ in the order of sums.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task_runs")
    build_task(Arithmetic((2, 3)), folder / "task", {"train": 60, "valid": 10})
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def losses(run: str, *overrides: str) -> list[float]:
    """Of the steps, and at last of the held-out examples."""
    assert main(["train", "run.yaml", f"run.dir={run}", "eval.batches=2", *overrides]) == 0
    records = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    return [record[key] for key in ("loss", "eval_loss") for record in records if key in record]


@pytest.mark.parametrize("samples", ["padded", "packed"])
def test_layouts_train_alike_on_whole_documents(samples: str, capsys: pytest.CaptureFixture[str]) -> None:
    alone = losses(f"alone_{samples}", f"data.samples={samples}")
    split = losses(f"split_{samples}", f"data.samples={samples}", "parallel.pp=2", "parallel.dp=2")
    assert len(alone) == 5 and split == pytest.approx(alone, rel=TOLERANCE)
    capsys.readouterr()
    answers = []
    for run in ("alone", "split"):
        assert main(["eval", "run.yaml", "--task", "--json", f"run.dir={run}_{samples}"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["all"]["examples"] == 20 and report["checkpoint"] == f"{run}_{samples}/checkpoints/step_000004"
        answers.append({**report, "checkpoint": None})
    assert answers[0] == answers[1]
