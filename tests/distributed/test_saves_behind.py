"""Saves that are written behind training: whole, of the step that they are of, whatever training does meanwhile."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from disturbed_runs import tensors_of

from lime_dist.checkpoint import writing
from lime_dist.checkpoint.reader import UNFINISHED, find_checkpoints, take_back_replaced
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter
from lime_dist.lifecycle.ending import NEVER_RESTART, REQUEUE
from lime_dist.training.records import read_records

CONFIG = {
    "model": {"num_layers": 6, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 95},
    "pipeline": {"num_microbatches": 2},
    "optim": {"lr": 0.05, "router_lr": 0.1, "eps": 1e-3, "warmup_steps": 0, "lr_schedule": "constant"},
    "data": {"train": "train", "seq_length": 8, "global_batch_size": 8},
    "checkpoint": {"keep": 100, "every": 2},
    "run": {"device": "cpu", "timeout_seconds": 60, "steps": 8},
}
BEHIND = "checkpoint.asynchronous=true"
PP3 = ("parallel.pp=3", "deepspeed.zero_optimization.stage=1")
LAYOUTS = (
    ("parallel.pp=3", "deepspeed.zero_optimization.stage=0", "parallel.dp=2"),
    (*PP3, "parallel.tp=2"),
    ("parallel.pp=3", "parallel.virtual_stages=2", "deepspeed.zero_optimization.stage=1", "run.dtype=bf16"),
    ("parallel.dp=3", "deepspeed.zero_optimization.stage=3", "data.global_batch_size=6", "pipeline.num_microbatches=1"),
    ("parallel.dp=2", "deepspeed.zero_optimization.stage=2"),
)
write = writing._write


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tokens = np.minimum(np.random.default_rng(5).zipf(1.3, 4000), 94)
    with IndexedWriter(tmp_path / "train", vocab_size=95) as writer:
        writer.add_document(tokens)
        writer.commit({"vocab_size": 95, "tokens": len(tokens)})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(run_dir: Path, *overrides: str) -> int:
    return main(["train", "run.yaml", f"run.dir={run_dir}", *overrides])


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps_done(run_dir: Path) -> int:
    return max((record["step"] for record in read_records(run_dir / "metrics.jsonl") if "loss" in record), default=0)


def write_late(part: writing.Unwritten) -> object:
    """What is staged is not looked at before training has gone on."""
    if part.meta.step < CONFIG["run"]["steps"]:
        wait_for(lambda: steps_done(part.checkpoints.parent) > part.meta.step)
    return write(part)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in find_checkpoints(run_dir / "checkpoints")]


def saves(run_dir: Path) -> list[dict[str, float]]:
    return [record for record in read_records(run_dir / "metrics.jsonl") if "save_seconds" in record]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_the_state_of_its_step(layout: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    assert train(folder / "at_once", *layout) == 0
    monkeypatch.setattr(writing, "_write", write_late)
    assert train(folder / "behind", *layout, BEHIND) == 0
    assert names(folder / "behind") == names(folder / "at_once") == [f"step_00000{step}" for step in (2, 4, 6, 8)]
    for name in names(folder / "behind"):
        assert tensors_of(folder / "behind/checkpoints" / name) == tensors_of(folder / "at_once/checkpoints" / name)
    *behind, last = saves(folder / "behind")
    assert [save["step"] for save in behind] == [2, 4, 6]
    assert all(save["save_wait_seconds"] < save["save_seconds"] for save in behind)
    for save in (last, *saves(folder / "at_once")):
        assert save["save_wait_seconds"] == save["save_seconds"]


def fail_at_step_4(part: writing.Unwritten) -> object:
    if part.meta.step == 4 and part.stem.startswith("pp01"):
        raise OSError(errno.ENOSPC, "")
    return write(part)


@pytest.mark.parametrize("more", [(), ("data.valid=train", "eval.every=1", "eval.batches=1")])
def test_a_full_disk_ends_the_run_soon(more: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(writing, "_write", fail_at_step_4)
    assert (
        train(folder / "run", *PP3, BEHIND, *more, "run.steps=100000", "checkpoint.keep=2", "checkpoint.every=2")
        == NEVER_RESTART
    )
    line = (
        f"lime-dist: checkpoint {folder}/run/checkpoints: No space left on device; free space or name another run.dir, "
    )
    assert f"{line}then start again (the last whole checkpoint is step_000002)" in capfd.readouterr().err.splitlines()
    assert sorted(os.listdir(folder / "run/checkpoints")) == ["step_000002"]


def in_a_process(run_dir: Path, *overrides: str) -> multiprocessing.Process:
    def command() -> None:
        os.setsid()
        os._exit(train(run_dir, *overrides))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    return process


def write_for_seconds(part: writing.Unwritten) -> object:
    time.sleep(3 if part.meta.step == 4 else 0)
    return write(part)


def test_a_stop_in_the_middle_of_a_write(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """What is being written is written to its end, then the run is saved where it stopped."""
    monkeypatch.setattr(writing, "_write", write_for_seconds)
    run = folder / "run"
    process = in_a_process(run, *PP3, BEHIND, "run.steps=100000", "checkpoint.every=4")
    wait_for(lambda: (run / "checkpoints/.unfinished-step_000004").is_dir() and steps_done(run) >= 5)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == REQUEUE
    first, last = names(run)
    assert first == "step_000004" and last == f"step_{steps_done(run):06d}" and steps_done(run) < 1000
    assert re.search(rf"saved \S+/{last} in \d+\.\d s$", capfd.readouterr().out, re.MULTILINE)
    assert train(folder / "whole", *PP3, f"run.steps={steps_done(run)}", "checkpoint.every=0") == 0
    assert tensors_of(run / "checkpoints" / last) == tensors_of(folder / "whole/checkpoints" / last)


def test_killed_in_the_middle_of_a_write(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(writing, "_write", write_for_seconds)
    run = folder / "run"
    process = in_a_process(run, *PP3, BEHIND, "run.steps=100000")
    wait_for(lambda: (run / "checkpoints/.unfinished-step_000004").is_dir() and steps_done(run) >= 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert names(run) == ["step_000002"]
    assert train(run, *PP3, BEHIND) == 0
    assert "resumed from" in (told := capfd.readouterr().out) and "step_000002, step 2 of 8" in told
    assert train(folder / "whole", *PP3) == 0
    assert tensors_of(run / "checkpoints/step_000008") == tensors_of(folder / "whole/checkpoints/step_000008")
    assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".")]


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_one_that_is_saved_again_is_never_gone(killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a return to it. killed_at: the rename before which the run is killed; the third is none."""
    final, folder, calls, rename = tmp_path / "step_000004", tmp_path / f"{UNFINISHED}step_000004", [], os.rename
    for path, content in ((final, "before"), (folder, "again")):
        path.mkdir()
        (path / "meta.json").write_text(content)

    def killed_before(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "rename", killed_before)
        writing._rename(folder, final)
    take_back_replaced(tmp_path)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_000004"]
    assert (final / "meta.json").read_text() == ("again" if killed_at == 3 else "before")


def test_those_of_every_so_many_steps_stay(folder: Path) -> None:
    assert train(folder / "run", *PP3, "checkpoint.every=1", "checkpoint.keep=2", "checkpoint.keep_every=3") == 0
    assert names(folder / "run") == ["step_000003", "step_000006", "step_000007", "step_000008"]
