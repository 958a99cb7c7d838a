"""What a run says of its size at its start and in a dry run: by hand, and the same from the open samples as from the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from lime_dist.cli.command_line import main
from lime_dist.config import Config, parse_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.preflight.input_files import TrainingText, find_training_text
from lime_dist.training.run_data import open_training_data
from lime_dist.training.run_size import size_lines

BASE = {
    "model": {"num_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 32},
    "data": {"train": "long", "seq_length": 10, "global_batch_size": 4},
    "run": {"steps": 50, "device": "cpu"},
}
LAYER = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16
ROUTERS = 2 * 2 * (2 + 3 + 4)  # of layers 1 to 3, [KV heads, layers, KV heads]
PARAMETERS = 32 * 16 + 4 * LAYER + 16


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, count in (("long", 40), ("short", 10)):
        with IndexedWriter(Path(name), vocab_size=32) as writer:
            for _ in range(count):
                writer.add_document(np.arange(25) % 32)
            writer.commit({"vocab_size": 32, "tokens": 25 * count})
    Path("run.yaml").write_text(yaml.safe_dump(BASE))


def make_config(*overrides: str) -> Config:
    return parse_config(BASE, overrides)


def test_the_lines() -> None:
    """A stream of 1,000 tokens has 99 samples of 10 inputs and a target."""
    text = TrainingText(num_tokens=1000, samples_per_epoch=(99,))
    assert size_lines(make_config(), text) == [
        f"{PARAMETERS + ROUTERS:,} parameters, {ROUTERS} of them in routers; training text of 1.0k tokens",
        "40 tokens a step, 2.0k in 50 steps: 2.02 epochs",
    ]
    assert size_lines(make_config("depth.router=none", "run.steps=20000"), None) == [
        f"{PARAMETERS:,} parameters",
        "40 tokens a step, 800.0k in 20,000 steps",
    ]


def test_sources_of_a_blend_have_epochs_of_their_own() -> None:
    blend = make_config("data.train=[{path: long, weight: 3}, {path: short, weight: 1}]")
    assert size_lines(blend, TrainingText(num_tokens=1250, samples_per_epoch=(99, 24)))[1].endswith(
        ": 1.52 to 2.08 epochs of the sources"
    )


@pytest.mark.parametrize(
    "overrides",
    (
        [],
        ["data.valid_fraction=0.2"],
        ["data.train=[{path: long, weight: 3}, {path: short, weight: 1}]"],
        ["data.samples=padded", "data.seq_length=30"],
        ["data.samples=packed", "data.seq_length=60"],
    ),
)
def test_the_files_say_what_the_open_samples_say(overrides: list[str]) -> None:
    config = make_config(*overrides)
    text = find_training_text(config)
    assert text is not None
    assert size_lines(config, text) == size_lines(config, open_training_data(config))


def test_a_dry_run_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "run.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{PARAMETERS + ROUTERS:,} parameters, {ROUTERS} of them in routers; training text of 1.0k tokens",
        "40 tokens a step, 2.0k in 50 steps: 2.02 epochs",
    ]
    for without in ("data.train=nothing", "data.train=[]", "data.seq_length=5000"):
        assert main(["train", "run.yaml", without, "--dry-run"]) == 0
        assert "text" not in "".join(capsys.readouterr().out.splitlines()[-2:])
