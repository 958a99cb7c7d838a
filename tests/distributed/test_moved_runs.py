"""A run's folder is whole: moved, without the tokenizer and text that it was trained with, and from any working folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

import lime_dist
from lime_dist.checkpoint.checking import meta_text
from lime_dist.cli.command_line import main
from lime_dist.config import load_config

VOCAB_SIZE = 300
CONFIG = {
    "model": {"num_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": VOCAB_SIZE},
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 2},
    "optim": {"warmup_steps": 0},
    "data": {"train": "data/tokens", "valid": "data/tokens", "tokenizer": "data/tokens.model", "seq_length": 16,
             "global_batch_size": 4},
    "eval": {"batches": 1},
    "run": {"dir": "runs/first", "steps": 2, "device": "cpu", "timeout_seconds": 60},
}  # fmt: skip
GREEDY = ("--prompt", "The sum", "--max-new-tokens", "6", "--temperature", "0")


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert main(list(arguments)) == 0
    return capfd.readouterr().out


def mistake(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that it ends in."""
    capfd.readouterr()
    assert main(list(arguments)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, a tokenizer, and a config of relative paths."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "text.txt").write_text("".join(f"{number} The sum of all earlier ones.\n" for number in range(200)))
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    tokens = str(folder / "data" / "tokens")
    text = ["--input", str(folder / "text.txt")]
    assert main(["data", "train-tokenizer", *text, "--vocab-size", str(VOCAB_SIZE), "--out", tokens]) == 0
    assert main(["data", "tokenize", *text, "--tokenizer", f"{tokens}.model", "--out", tokens]) == 0
    return folder


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A run's folder, where its token files are now, and what it said where it was trained."""

    run: Path
    tokens: str
    text: str
    eval_loss: float


@pytest.fixture
def moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Moved:
    """The working folder is another one too, and the tokenizer is gone."""
    place = shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(place)
    said(capfd, "train", "run.yaml")
    text = said(capfd, "generate", "runs/first", *GREEDY)
    eval_loss = json.loads(said(capfd, "eval", "run.yaml"))["eval_loss"]
    (place / "data/tokens.model").unlink()
    shutil.move(place / "runs/first", tmp_path / "moved")
    shutil.move(place / "data", tmp_path / "data")
    shutil.rmtree(place)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Moved(run=tmp_path / "moved", tokens=str(tmp_path / "data" / "tokens"), text=text, eval_loss=eval_loss)


def test_a_moved_run(moved: Moved, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, config = str(moved.run), str(moved.run / "config.yaml")
    assert said(capfd, "generate", run, *GREEDY) == moved.text
    model = lime_dist.load_model(moved.run)
    assert model.generate("The sum", max_new_tokens=6, temperature=0) + "\n" == moved.text
    said(capfd, "checkpoint", "export-hf", run, "--out", "exported")
    assert Path("exported/tokenizer.model").read_bytes() == (moved.run / "tokenizer.model").read_bytes()
    Path("text.txt").write_text("The sum of all earlier ones, and of the next.\n" * 20)
    said(capfd, "analyze", run, "--text", "text.txt", "--batches", "1")
    said(capfd, "compare", run, "--metric", "loss")
    assert json.loads(said(capfd, "checkpoint", "inspect", run, "--json"))["run"] == run

    gone = tmp_path / "project" / "data" / "tokens"
    assert f"data.train: {gone}" in mistake(capfd, "eval", config)
    assert f"data.valid: {gone}" in mistake(capfd, "analyze", run, "--batches", "1")
    here = [f"data.train={moved.tokens}", f"data.valid={moved.tokens}"]
    report = json.loads(said(capfd, "eval", config, *here))
    assert report["eval_loss"] == moved.eval_loss and report["checkpoint"].startswith(f"{run}/checkpoints/")

    told = said(capfd, "train", config, *here, "run.steps=3")
    assert f"resumed from {run}/checkpoints/step_000002, step 2 of 3" in told
    assert "changed since then: run.steps 2 -> 3\n" in told
    assert (
        load_config(config).run.dir == run and "project" not in yaml.safe_load(Path(config).read_text())["run"]["dir"]
    )
    assert not (tmp_path / "project").exists()


def test_another_working_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run is found from there by its config.yaml. Of an earlier version, whose paths are relative, from its own folder only."""
    monkeypatch.chdir(project)
    said(capfd, "train", "run.yaml", "run.dir=runs/second")
    run = project / "runs" / "second"
    config = run / "config.yaml"
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(config.read_text())
    assert [source["path"] for source in written["data"]["train"]] == [str(project / "data" / "tokens")]
    assert written["run"]["dir"] == str(run) and written["data"]["tokenizer"] == str(project / "data/tokens.model")
    assert json.loads(said(capfd, "eval", str(config)))["step"] == 2

    monkeypatch.chdir(project)
    earlier = yaml.safe_dump(written).replace(f"{project}/", "")
    config.write_text(earlier)
    meta = run / "checkpoints" / "step_000002" / "meta.json"
    values = json.loads(meta.read_text().replace(f"{project}/", ""))
    del values["sha256"]
    meta.write_bytes(meta_text(values))
    assert str(project) not in earlier + meta.read_text()
    told = said(capfd, "train", "runs/second/config.yaml", "run.steps=3")
    assert "resumed from runs/second/checkpoints/step_000002, step 2 of 3" in told
    assert "changed since then: run.steps 2 -> 3\n" in told
    assert yaml.safe_load(config.read_text())["run"]["dir"] == str(run)
