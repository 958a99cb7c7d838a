"""The Python API as a notebook uses it, on checkpoints of several layouts; the README's example as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

import lime_dist
from lime_dist.cli.command_line import main
from lime_dist.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 300
# A tiny quickstart, in the folders that the README names.
CONFIG = {
    "model": {
        "num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": VOCAB_SIZE,
    },
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 2},
    "optim": {"lr": 0.02, "eps": 1e-3, "warmup_steps": 0},
    "data": {"train": "tokens", "valid": "tokens", "tokenizer": "tokenizer.model", "seq_length": 16, "global_batch_size": 4},
    "eval": {"batches": 1},
    "run": {"dir": "runs/quickstart", "device": "cpu", "steps": 2, "timeout_seconds": 60},
}  # fmt: skip
TEXT = "The function returns a list of values. Each value is the sum of all earlier ones, taken once.\n"
# fp32: layouts differ in the order of sums, which two updates enlarge.
TOLERANCE = 1e-4


def python(code: str, folder: Path) -> str:
    """What a fresh interpreter prints: this one may have imported torch, and runs no threaded operation before ranks start."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def lime(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lime_dist.cli", *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages, one of two tensor ranks, and one whose weights are the initial ones."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "text.txt").write_text("".join(f"{number} {TEXT}" for number in range(200)))
    lime(
        folder, "data", "train-tokenizer", "--input", "text.txt", "--vocab-size", str(VOCAB_SIZE), "--out", "tokenizer"
    )
    lime(folder, "data", "tokenize", "--input", "text.txt", "--tokenizer", "tokenizer.model", "--out", "tokens")
    (folder / "configs").mkdir()
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(CONFIG))
    lime(folder, "train", "configs/quickstart.yaml")
    lime(folder, "train", "configs/quickstart.yaml", "parallel.pp=1", "parallel.tp=2", "run.dir=runs/tensor")
    lime(folder, "train", "configs/quickstart.yaml", "optim.lr=0", "optim.router_lr=0", "run.dir=runs/still")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(1))


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def example() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return code


def test_the_readmes_example(folder: Path) -> None:
    said = python(example(), folder)
    assert "stage" in said and "boundary" in said and f"{VOCAB_SIZE}]" in said.replace(")", "]")
    assert said.splitlines()[-1].startswith("The function returns a list of")


@torch.no_grad()
def test_a_checkpoint_of_any_layout(here: Path, tokens: torch.Tensor) -> None:
    stages, tensor_ranks = lime_dist.load_model("runs/quickstart"), lime_dist.load_model(Path("runs/tensor"))
    logits = stages.logits(tokens)
    assert logits.shape == (2, 9, VOCAB_SIZE)
    assert distance(tensor_ranks.logits(tokens), logits) < TOLERANCE
    assert distance(lime_dist.build_model(stages.config).logits(tokens), logits) > 100 * TOLERANCE


@torch.no_grad()
def test_a_new_model_has_the_weights_that_a_training_begins_with(here: Path, tokens: torch.Tensor) -> None:
    config = lime_dist.load_config("configs/quickstart.yaml")
    assert torch.equal(lime_dist.build_model(config).logits(tokens), lime_dist.load_model("runs/still").logits(tokens))


def test_it_learns_as_any_module(here: Path, tokens: torch.Tensor) -> None:
    model = lime_dist.build_model(lime_dist.load_config(CONFIG, ["depth.pattern=first:1"]))
    optimizer = torch.optim.SGD(model.network.parameters(), lr=0.5)
    before = model.loss(tokens)
    before.backward()
    optimizer.step()
    assert model.loss(tokens) < before.detach()


def test_loss_and_logits_agree(here: Path, tokens: torch.Tensor) -> None:
    model = lime_dist.load_model("runs/quickstart")
    logits = model.logits(tokens[:, :-1]).flatten(0, 1)
    assert torch.allclose(model.loss(tokens), torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))


def test_generation_is_the_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = lime_dist.load_model("runs/quickstart/checkpoints/step_000002")
    text = model.generate("Each value", max_new_tokens=8, temperature=0.9, seed=3)
    main(["generate", "runs/quickstart", "--prompt", "Each value"]
         + ["--max-new-tokens", "8", "--temperature", "0.9", "--seed", "3"])  # fmt: skip
    assert capsys.readouterr().out == f"{text}\n"


def test_the_plan_is_the_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = lime_dist.build_plan(lime_dist.load_config("configs/quickstart.yaml", ["parallel.pp=2"]))
    main(["plan", "configs/quickstart.yaml", "parallel.pp=2", "--json"])
    assert plan == json.loads(capsys.readouterr().out)
    main(["plan", "configs/quickstart.yaml", "parallel.pp=2"])
    assert capsys.readouterr().out == f"{plan}\n"


def test_a_mistake_names_its_key(here: Path) -> None:
    with pytest.raises(ConfigError, match="^model.num_layers: 0 must be at least 1$"):
        lime_dist.load_config(CONFIG | {"model": CONFIG["model"] | {"num_layers": 0}})
    with pytest.raises(DataError, match="nowhere.model does not exist"):
        lime_dist.load_model("runs/quickstart", tokenizer="nowhere.model")
    with pytest.raises(ConfigError, match="^data.tokenizer: "):
        lime_dist.build_model(lime_dist.load_config(CONFIG, ["data.tokenizer=null"])).generate("x")


def names(code: str) -> Sequence[str]:
    return json.loads(python(f"import json, sys, lime_dist\n{code}\nprint(json.dumps(sorted(sys.modules)))", ROOT))


def test_the_package_alone_imports_no_framework() -> None:
    assert "torch" not in names("dir(lime_dist)")
    assert {"torch", "lime_dist.api"} <= set(names("lime_dist.load_config"))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lime_dist.nonsense  # noqa: B018
