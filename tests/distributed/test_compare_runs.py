"""A run and its twin, trained for real and compared: training leaves what a comparison reads, after a resume too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from lime_dist.cli.command_line import main
from lime_dist.config import check_config, load_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.plan.run_plan import plan_run

CONFIG = {
    "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"pp": 2},
    "pipeline": {"num_microbatches": 2},
    "optim": {"lr": 0.02, "warmup_steps": 0},
    "data": {"train": "train", "valid": "valid", "seq_length": 12, "global_batch_size": 4},
    "eval": {"every": 2, "batches": 2},
    "checkpoint": {"every": 4},
    "run": {"dir": "lime", "device": "cpu", "steps": 8, "timeout_seconds": 60},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with token files and a config."""
    generator = np.random.default_rng(5)
    for name, count in (("train", 40), ("valid", 15)):
        lengths = generator.integers(20, 60, count)
        with IndexedWriter(tmp_path / name, vocab_size=96) as writer:
            for length in lengths:
                writer.add_document(np.minimum(generator.zipf(1.3, length), 95))
            writer.commit({"vocab_size": 96, "tokens": int(lengths.sum())})
    (tmp_path / "lime.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_and_its_twin(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["twin", "lime.yaml", "--out", "llama.yaml"]) == 0
    assert main(["train", "lime.yaml"]) == 0
    shutil.rmtree(folder / "lime" / "checkpoints" / "step_000008")  # as if it had been killed before the last one
    assert main(["train", "lime.yaml"]) == 0
    assert main(["train", "llama.yaml", "parallel.pp=1"]) == 0
    capsys.readouterr()
    assert main(["compare", "lime", "llama", "--json", "--html", "page.html"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metric"] == "eval_loss"
    assert [variant["name"] for variant in report["variants"]] == ["LIMe, full", "LLaMA"]
    assert report["variants"][1]["differs_from_reference"] == {"depth.router": "none"}
    for variant, config_file in zip(report["variants"], ("lime.yaml", "llama.yaml")):
        (run,) = variant["runs"]
        config = check_config(load_config(config_file))
        assert (run["steps"], run["tokens"]) == (8, 8 * config.tokens_per_step)
        assert run["model_flops"] == 8 * plan_run(config).model_flops_per_step
        records = [json.loads(line) for line in (folder / run["folder"] / "metrics.jsonl").read_text().splitlines()]
        (last,) = (record["eval_loss"] for record in records if "eval_loss" in record and record["step"] == 8)
        assert run["final_loss"] == variant["final_loss"]["mean"] == last
    assert "<svg" in (folder / "page.html").read_text()
