"""A tokenizer.json through the commands: token files, two steps of training, text from the checkpoint, and a task's accuracy."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import lime_dist
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import check_files
from lime_dist.data.tokenizer import load_tokenizer
from lime_dist.generate import encode_prompt

VOCAB_SIZE = 300
CONFIG = {
    "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": VOCAB_SIZE},
    "optim": {"warmup_steps": 0},
    "data": {"train": "tokens", "valid": "tokens", "tokenizer": "tokenizer.json", "seq_length": 16, "global_batch_size": 4},
    "eval": {"batches": 1},
    "run": {"dir": "run", "steps": 2, "device": "cpu", "timeout_seconds": 60},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, and a tokenizer as GPT-2's: one special token that both begins and ends documents."""
    folder = tmp_path_factory.mktemp("json")
    lines = [f"{number} layers read what earlier layers left; it is the sum of all." for number in range(200)]
    (folder / "text.txt").write_text("\n".join(lines))
    library = Tokenizer(models.BPE())
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(lines, trainer)
    library.save(str(folder / "tokenizer.json"))
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def lime(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def test_from_text_to_answers(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    given = ("--tokenizer", "tokenizer.json")
    lime("data", "tokenize", "--input", "text.txt", "--document-per-line", "--add-bos", "--out", "tokens", *given)
    Path("tokens.meta.json").unlink()
    lime("data", "adopt", "tokens", *given)
    assert json.loads(Path("tokens.meta.json").read_text())["bos_id"] == load_tokenizer("tokenizer.json").eos_id
    lime("train", "run.yaml")
    assert "saved run/checkpoints/step_000002" in capfd.readouterr().out
    lime("generate", "run", "--prompt", "layers read", "--max-new-tokens", "5", "--temperature", "0")
    printed = capfd.readouterr().out
    model = lime_dist.load_model("run", tokenizer="tokenizer.json")
    assert model.tokenizer is not None and model.tokenizer.decode(model.tokenizer.encode("layers")) == "layers"
    assert printed == model.generate("layers read", max_new_tokens=5, temperature=0) + "\n"
    lime("generate", "run", "--prompt", "layers read", "--max-new-tokens", "5", "--temperature", "0", "--add-bos")
    assert capfd.readouterr().out == model.generate("layers read", max_new_tokens=5, temperature=0, add_bos=True) + "\n"
    assert encode_prompt(model.tokenizer, "", add_bos=False) == [model.tokenizer.bos_id]

    lime(
        "data", "build-task", "arithmetic", "--operands", "2", "--train", "20", "--valid", "6", "--out", "task", *given
    )
    assert not Path("task/tokenizer.model").exists() and check_files("task/train").vocab_size == VOCAB_SIZE
    task = (
        "data.train=task/train",
        "data.valid=task/valid",
        "data.samples=padded",
        "data.seq_length=64",
        "run.dir=task/run",
    )
    lime("train", "run.yaml", *task)
    capfd.readouterr()
    lime("eval", "run.yaml", "--task", "--json", *task)
    report = json.loads(capfd.readouterr().out)
    assert report["task"] == "arithmetic" and report["all"]["examples"] == 6
    records = [json.loads(line) for line in Path("task/valid.jsonl").read_text().splitlines()]
    known = {one["prompt"]: one["answer"] for one in records}
    assert report["wrong"] and all(known[wrong["prompt"]] == wrong["answer"] for wrong in report["wrong"])


def test_another_tokenizer_than_the_files_were_made_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    lime("data", "tokenize", "--input", "text.txt", "--tokenizer", "tokenizer.json", "--out", "tokens", "--overwrite")
    other = tmp_path / "tokenizer.json"
    other.write_text(Path("tokenizer.json").read_text() + "\n")
    capfd.readouterr()
    assert main(["train", "run.yaml", f"data.tokenizer={other}", f"run.dir={tmp_path}/run"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"data.tokenizer: {other} is not the tokenizer that made data.train tokens" in line
    assert main(["generate", "run", "--prompt", "a", "--eos", "<nope>"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"lime-dist: --eos: {folder}/run/tokenizer.json has no token '<nope>'; name one of its own"


def test_a_checkpoint_knows_the_tokenizer_of_its_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Another one of as many ids is refused where the run goes on, where its weights are taken, and, without the run's own
    copy, where it writes text."""
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    lime("data", "tokenize", "--input", "text.txt", "--tokenizer", "tokenizer.json", "--out", "tokens", "--overwrite")
    lime("train", "run.yaml", "run.dir=own")
    capfd.readouterr()
    lime("checkpoint", "inspect", "own", "--json")
    facts = json.loads(capfd.readouterr().out)
    assert facts["tokenizer_sha256"] == hashlib.sha256(Path("tokenizer.json").read_bytes()).hexdigest()
    assert facts["versions"].keys() == {"lime_dist", "torch", "deepspeed", "megatron-core"}

    with open("tokenizer.json", "a") as file:
        file.write("\n")
    lime("data", "tokenize", "--input", "text.txt", "--tokenizer", "tokenizer.json", "--out", "tokens", "--overwrite")
    made = "data.train: tokens was made by another tokenizer than the text that checkpoint own/checkpoints/step_000002 was trained on"
    for more in (("run.dir=own", "run.steps=3"), ("run.dir=other", "checkpoint.weights_from=own")):
        capfd.readouterr()
        assert main(["train", "run.yaml", *more]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"lime-dist: {made}; name token files of that tokenizer")
    lime("generate", "own", "--prompt", "layers")
    Path("own/tokenizer.json").unlink()
    capfd.readouterr()
    assert main(["generate", "own", "--prompt", "layers"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"lime-dist: data.tokenizer: {Path.cwd()}/tokenizer.json is not the tokenizer that made the text that checkpoint own"
    )
    lime("generate", "own", "--prompt", "layers", "--tokenizer", "tokenizer.json")  # asked for by name
