"""Runs that stand still: the rank that made them is named, whoever noticed first, and every rank that can shows its stacks."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch.distributed as dist
import yaml
from test_train import BASE

from lime_dist.checkpoint import writing
from lime_dist.checkpoint.edges import ready_plan
from lime_dist.cli.command_line import main
from lime_dist.config import load_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.lifecycle import local
from lime_dist.lifecycle.ending import DONE, FAILED, OUTCOME_VARIABLE, read_outcome
from lime_dist.lifecycle.heartbeat import heartbeat_folder, read_heartbeats
from lime_dist.lifecycle.launcher import Place
from lime_dist.lifecycle.pulse import Pulse
from lime_dist.lifecycle.watchdog import Watchdog
from lime_dist.lime.layers import DecoderLayer

pytestmark = pytest.mark.slow

TIMEOUT = 6  # seconds; long enough to build a rank on a busy machine
PROMPT = (
    TIMEOUT + 12
)  # a quarter of it in which all fire, a second for the cause to show, five for a deaf rank to leave


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_endless_run(tmp_path)


def write_endless_run(folder: Path) -> Path:
    """Its config file, with token files beside it."""
    with IndexedWriter(folder / "train", vocab_size=96) as writer:
        for document in np.random.default_rng(5).integers(0, 96, (40, 50)):
            writer.add_document(document)
        writer.commit({"vocab_size": 96, "tokens": 2000})
    run = BASE["run"] | {"dir": str(folder / "run"), "steps": 100000, "timeout_seconds": TIMEOUT}
    data = BASE["data"] | {"train": str(folder / "train"), "valid": None}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | {"run": run, "data": data, "checkpoint": {"every": 0}}))
    return path


def start(config: Path, *overrides: str, command: str = "train") -> multiprocessing.Process:
    def run() -> None:
        sys.stderr = (config.parent / "stderr").open("w")
        os.environ[OUTCOME_VARIABLE] = str(config.parent / "outcome")
        sys.exit(main([command, str(config), *overrides]))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_until(condition: Callable[[], bool], process: multiprocessing.Process) -> None:
    while not condition():
        assert process.is_alive()
        time.sleep(0.02)


def steps_done(config: Path) -> int:
    path = config.parent / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def ended(process: multiprocessing.Process, config: Path, started: float) -> str:
    """stderr of a run that ended in time and left no rank behind."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    process.join(PROMPT)
    assert process.exitcode == FAILED
    assert TIMEOUT - 1 < time.monotonic() - started < PROMPT
    assert not psutil.wait_procs(ranks, timeout=0)[1]
    return (config.parent / "stderr").read_text()


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_stopped_rank_is_named_by_the_others(stopped: int, config: Path) -> None:
    process = start(config, "parallel.pp=4")
    wait_until(lambda: steps_done(config) > 3, process)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    ranks[stopped].suspend()
    errors = ended(process, config, time.monotonic())

    silent = rf"rank {stopped} \(pp={stopped} dp=0 tp=0\)"
    line = rf"no progress for 6 s; first silent: {silent} on \S+, stage {stopped}, since step \d+ [a-z]+.*; no sign of life for \d+ s.*"
    for rank in set(range(4)) - {stopped}:
        assert re.search(
            rf"^stacks of rank {rank}:\nThread (.|\n)*?, in (_train_step|accumulate|_evaluate_and_agree)\n",
            errors,
            re.MULTILINE,
        )
    assert len(re.findall(rf"^lime-dist: {line}$", errors, re.MULTILINE)) == 3
    assert f"stacks of rank {stopped}:" not in errors
    assert re.fullmatch(rf"lime-dist: {silent} failed: {line}", errors.splitlines()[-1])
    code, reason = read_outcome(config.parent / "outcome")
    assert code == FAILED and re.fullmatch(line, reason)


@pytest.mark.parametrize("layout", ["pp=3 dp=2", "pp=3 tp=2"])
def test_a_rank_asleep_inside_its_forward_is_named(layout: str, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, calls = DecoderLayer.forward, []

    def fall_asleep(layer: DecoderLayer, *args: object) -> object:
        calls.append(None)
        if os.environ["RANK"] == "2" and len(calls) == 20:
            (config.parent / "asleep").touch()
            time.sleep(PROMPT)
        return forward(layer, *args)

    monkeypatch.setattr(DecoderLayer, "forward", fall_asleep)  # ranks are forked, so they have it
    process = start(config, *(f"parallel.{size}" for size in layout.split()))
    wait_until((config.parent / "asleep").exists, process)
    errors = ended(process, config, time.monotonic())

    if "tp=2" in layout:  # of two tensor ranks inside of the same layer it cannot be told which one waits for the other
        named = r"silent: among the tensor ranks of stage 1 \(2, 3\) on \S+, since step \d+ forward microbatch \d; .*"
    else:
        named = r"first silent: rank 2 \(pp=1 .*stage 1, since step \d+ forward microbatch \d; alive, and inside of it"
    assert re.search(rf"^lime-dist: no progress for 6 s; {named}$", errors, re.MULTILINE)
    assert re.search(rf"^lime-dist: rank [23] \(.*failed: .*{named}$", errors.splitlines()[-1])
    assert all(f"stacks of rank {rank}:" in errors for rank in range(6))
    assert re.search(r"in fall_asleep\n *time.sleep", errors)


def stop_self() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_in_the_last_save(patch: pytest.MonkeyPatch) -> None:
    write = writing._write

    def stop(part: writing.Unwritten) -> object:
        stop_self() if os.environ["RANK"] == "1" else None
        return write(part)

    patch.setattr(writing, "_write", stop)


def stop_behind_the_last_save(patch: pytest.MonkeyPatch) -> None:
    settle = Watchdog.settle

    def stop(watchdog: Watchdog, code: int, reason: str) -> None:
        stop_self() if os.environ["RANK"] == "1" else None
        settle(watchdog, code, reason)

    patch.setattr(Watchdog, "settle", stop)


def stop_behind_the_last_barrier(patch: pytest.MonkeyPatch) -> None:
    barrier = dist.barrier

    def stop() -> None:
        barrier()
        stop_self() if os.environ["RANK"] == "1" else None

    patch.setattr(dist, "barrier", stop)
    patch.setattr(local, "STRAGGLER_LIMIT", timedelta(seconds=TIMEOUT))


def freeze_behind_the_last_barrier(patch: pytest.MonkeyPatch) -> None:
    barrier = dist.barrier

    def freeze() -> None:
        barrier()
        time.sleep(3 * PROMPT if os.environ["RANK"] == "1" else 0)

    patch.setattr(dist, "barrier", freeze)


SILENT = r"no progress for 6 s; first silent: rank 1 \(pp=1 dp=0 tp=0\) on \S+, stage 1, since step \d .*; "
DONE_BEFORE = r".*; the run itself had ended: step 2 of 2"
# How a rank goes, the outcome of the run, and how it is named: what is saved on all ranks is done.
LATE = [
    (stop_in_the_last_save, FAILED, SILENT + r"no sign of life for \d+ s: .* gone"),
    (stop_behind_the_last_save, DONE, SILENT + r"no sign of life" + DONE_BEFORE),
    (stop_behind_the_last_barrier, DONE, r"no end 0:00:06 after others had ended; still running: rank 1"),
    (freeze_behind_the_last_barrier, DONE, SILENT + r"alive" + DONE_BEFORE),
]


@pytest.mark.parametrize(("go", "outcome", "line"), LATE, ids=lambda value: getattr(value, "__name__", None))
def test_a_rank_that_goes_behind_the_last_step_is_named(
    go: Callable[[pytest.MonkeyPatch], None], outcome: int, line: str, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(monkeypatch)  # ranks are forked, so they have it
    process = start(config, "parallel.pp=3", "run.steps=2")
    wait_until(lambda: steps_done(config) >= 2, process)
    process.join(2 * PROMPT)
    assert process.exitcode == FAILED
    last = (config.parent / "stderr").read_text().splitlines()[-1]
    assert re.fullmatch(rf"lime-dist: rank 1 \(pp=1 dp=0 tp=0\) failed: {line}", last)
    assert read_outcome(config.parent / "outcome")[0] == outcome
    monkeypatch.undo()
    assert main(["train", str(config), "parallel.pp=3", "run.steps=2"]) == DONE
    assert steps_done(config) >= 2


def test_an_evaluation_that_stands_still_ends_and_names_the_rank(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"data.valid={config.parent / 'train'}"
    assert main(["train", str(config), "parallel.pp=3", "run.steps=1", data, "eval.batches=1"]) == DONE
    kept = [path.read_text() for path in sorted(heartbeat_folder(config.parent / "run").glob("*.json"))]

    forward = DecoderLayer.forward

    def fall_asleep(layer: DecoderLayer, *args: object) -> object:
        if os.environ["RANK"] == "2":
            (config.parent / "asleep").touch()
            time.sleep(PROMPT)
        return forward(layer, *args)

    monkeypatch.setattr(DecoderLayer, "forward", fall_asleep)
    process = start(config, "parallel.pp=3", data, command="eval")
    wait_until((config.parent / "asleep").exists, process)
    errors = ended(process, config, time.monotonic())
    assert re.search(r"failed: no progress for 6 s; first silent: rank 2 \(.*since step 0 forward microbatch 1", errors)
    assert kept == [path.read_text() for path in sorted(heartbeat_folder(config.parent / "run").glob("*.json"))]


def test_heartbeats_tell_where_each_rank_is_and_that_it_left(config: Path) -> None:
    assert main(["train", str(config), "parallel.pp=3", "run.steps=2"]) == 0
    heartbeats = read_heartbeats(heartbeat_folder(config.parent / "run"), 3)
    assert [beat.coordinate.pp_rank for beat in heartbeats] == [0, 1, 2]
    assert all(beat.ended and beat.step == 2 and beat.phase == "leave" for beat in heartbeats)
    assert len({beat.done for beat in heartbeats}) == 1 and len({beat.pid for beat in heartbeats}) == 3


def test_a_folder_that_takes_no_heartbeats_does_not_stop_training(
    config: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (config.parent / "run").mkdir()
    (config.parent / "run" / "heartbeat").write_text("a file where the folder should be")
    assert main(["train", str(config), "parallel.pp=2", "run.steps=30"]) == 0
    assert capfd.readouterr().err.count("no heartbeat in") == 2, "once a rank"


def test_time_in_which_a_job_was_suspended_is_no_silence(config: Path) -> None:
    """The pause is longer than the timeout, the rank's own work shorter."""
    loaded = ready_plan(load_config(config, ["run.timeout_seconds=1"]), 1).config
    began = multiprocessing.get_context("fork").Event()

    def rank() -> None:
        with Watchdog(loaded, Place(rank=0, local_rank=0, world_size=1), Pulse()):
            began.set()
            time.sleep(0.3)  # it is suspended in this
            time.sleep(0.45)  # a watchdog that counts that has fired by now
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    began.wait()
    psutil.Process(process.pid).suspend()
    time.sleep(1.5)
    psutil.Process(process.pid).resume()
    process.join()
    assert process.exitcode == 0
