"""`lime-dist` as a process: how it is started, and what reads its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from run_records import write_run
from test_cli_errors import BASE, write_checkpoint, write_tokens

from lime_dist import __version__
from lime_dist.cli.command_line import main
from lime_dist.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each command below needs."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE | {"run": BASE["run"] | {"dir": "new"}}))
    write_run(folder / "run")
    (folder / "run" / "checkpoints").mkdir()
    write_run(folder / "other", "run.seed=1")
    changes = "model.vocab_size=300", "data.tokenizer=wide.model", "depth.router=none"
    write_checkpoint(folder / "run" / "checkpoints" / "step_000001", *changes)
    (folder / "run" / "slurm" / "logs").mkdir(parents=True)
    (folder / "run" / "slurm" / "config.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "run" / "slurm" / "history.tsv").write_text("2026-01-31T12:00:00Z\t9\t-\tsubmitted\t0\t\n")
    (folder / "run" / "slurm" / "logs" / "9.0.rank_000.log").write_text("step 1\n")
    (folder / "text.txt").write_text("".join(f"line {line} of a text to read\n" for line in range(200)))
    train_tokenizer([folder / "text.txt"], folder / "wide", vocab_size=300, workers=1)
    for name in ("train", "valid"):
        write_tokens(folder / name)
    return folder


def start(folder: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "lime_dist", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("module", ["lime_dist", "lime_dist.cli"])
def test_python_m(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"lime-dist {__version__}\n")


# A line each: some print much, some so little that it is written at the end only.
OUTPUTS = (
    "--help",
    "plan --help",
    "plan run.yaml",
    "plan run.yaml --json",
    "train run.yaml --dry-run",
    "status run --json",
    "logs run",
    "checkpoint inspect run",
    "checkpoint verify run",
    "data tokenize --input text.txt --tokenizer wide.model --out tokens --overwrite",
    "generate run --prompt line --max-new-tokens 4",
    "analyze run --json --device cpu",
    "compare run other",
)


@pytest.mark.parametrize("line", OUTPUTS)
def test_a_reader_that_has_enough(folder: Path, line: str) -> None:
    """As `lime-dist ... | true`: no stack trace, and the exit code of a program that SIGPIPE ends."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = start(folder, *line.split(), stdout=writer)
    finally:
        os.close(writer)
    assert done.stderr == "" and done.returncode in ((0, 141) if "--help" in line else (141,))


@pytest.mark.parametrize(
    ("prompt", "count", "key"),
    [("line", 5, ""), ("", 8, ""), ("line", 9, "--max-new-tokens"), ("line " * 20, 1, "--prompt")],
)
def test_text_beyond_the_trained_length_is_told_once(folder: Path, prompt: str, count: int, key: str) -> None:
    """The model has seen 8 tokens (data.seq_length) at a time; an empty prompt begins with BOS."""
    options = ("--max-new-tokens", str(count), "--device", "cpu")
    done = start(folder, "generate", "run", "--prompt", prompt, *options, stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.startswith(prompt.strip())
    lines = done.stderr.splitlines()
    assert len(lines) == bool(key) and all(
        line.startswith(f"lime-dist: warning: {key}: the text may reach") for line in lines
    )


def test_a_broken_pipe_that_is_not_the_readers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise BrokenPipeError("of a process that was asked something")

    monkeypatch.setattr("lime_dist.cli.command_line._run_command", fail)
    with pytest.raises(BrokenPipeError, match="was asked something"):
        main(["init", "folder"])
