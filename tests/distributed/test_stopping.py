"""Signals at any time: in start-up, in an evaluation, before the ranks have met. What was not done then is done by the next start."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from power_cuts import Journal, moments
from test_watchdog import start, wait_until, write_endless_run

from lime_dist.checkpoint.reader import find_checkpoints
from lime_dist.cli.command_line import main
from lime_dist.data import dataset
from lime_dist.data.indexed import TokenFiles
from lime_dist.lifecycle.ending import DONE, FAILED, OUTCOME_VARIABLE, REQUEUE, read_outcome
from lime_dist.lifecycle.heartbeat import heartbeat_folder, read_heartbeats
from lime_dist.lifecycle.local import free_port
from lime_dist.training.records import read_records

PATIENCE = 60  # seconds; a reaction takes a batch, and whatever a busy machine adds
ENDLESS = "eval.batches=100000"
LAYOUT = ("parallel.pp=2", "run.timeout_seconds=60", "eval.every=0", "checkpoint.every=0")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_endless_run(tmp_path)


def held_out(config: Path) -> str:
    return f"data.valid={config.parent / 'train'}"


def is_evaluating(folder: Path) -> bool:
    beat = read_heartbeats(folder, 1)[0]
    return beat is not None and beat.phase == "forward"


def evaluated(config: Path) -> list[int]:
    return [record["step"] for record in read_records(config.parent / "run" / "metrics.jsonl") if "eval_loss" in record]


def trained(config: Path) -> list[int]:
    return [record["step"] for record in read_records(config.parent / "run" / "metrics.jsonl") if "loss" in record]


def saved(config: Path) -> list[str]:
    return [path.name for path in find_checkpoints(config.parent / "run" / "checkpoints")]


def test_a_signal_in_an_evaluation_leaves_it_to_the_next_start(config: Path) -> None:
    first = start(config, *LAYOUT, held_out(config), ENDLESS, "run.steps=2")
    wait_until(lambda: is_evaluating(heartbeat_folder(config.parent / "run")), first)
    first.terminate()
    first.join(PATIENCE)
    assert first.exitcode == REQUEUE
    assert read_outcome(config.parent / "outcome") == (REQUEUE, "SIGTERM at step 0 of 2")
    assert evaluated(config) == trained(config) == saved(config) == []

    whole = ("train", str(config), *LAYOUT, held_out(config), "eval.batches=1")
    assert main([*whole, "run.steps=2"]) == DONE
    assert (evaluated(config), saved(config)) == ([0, 2], ["step_000002"])

    (config.parent / "outcome").unlink()
    last = start(config, *LAYOUT, held_out(config), ENDLESS, "run.steps=4")
    wait_until(lambda: trained(config) == [1, 2, 3, 4], last)
    last.terminate()
    last.join(PATIENCE)
    assert last.exitcode == REQUEUE, "all steps are done, their evaluation is not"
    assert read_outcome(config.parent / "outcome") == (REQUEUE, "SIGTERM at step 4 of 4")
    assert (evaluated(config), saved(config)) == ([0, 2], ["step_000002", "step_000004"])

    for _ in range(2):  # once and no more
        assert main([*whole, "run.steps=4"]) == DONE
        assert (evaluated(config), trained(config)) == ([0, 2, 4], [1, 2, 3, 4])


def test_a_signal_ends_the_eval_command(config: Path) -> None:
    assert main(["train", str(config), *LAYOUT, "run.steps=1"]) == DONE
    process = start(config, *LAYOUT, held_out(config), ENDLESS, command="eval")
    wait_until(lambda: is_evaluating(heartbeat_folder(config.parent / "run") / "eval"), process)
    process.terminate()
    process.join(PATIENCE)
    assert process.exitcode == REQUEUE
    errors = (config.parent / "stderr").read_text()
    assert errors.splitlines()[-1] == "lime-dist: SIGTERM: the evaluation was stopped; start it again"
    assert "Traceback" not in errors


def test_a_signal_while_data_is_opened_ends_the_start(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two token files each rank has opened one when all agree to leave."""
    opened, sent, open_source = config.parent / "opened", config.parent / "sent", dataset.check_files

    def slowly(prefix: str, **more: str) -> TokenFiles:
        with opened.open("a") as file:
            file.write("one\n")
        while not sent.exists():
            time.sleep(0.05)
        return open_source(prefix, **more)

    monkeypatch.setattr(dataset, "check_files", slowly)  # ranks are forked, so they have it
    process = start(config, *LAYOUT, held_out(config))
    wait_until(lambda: opened.exists() and len(opened.read_text().splitlines()) == 2, process)
    process.terminate()
    wait_until(lambda: (config.parent / "stderr").read_text().count("SIGTERM: stopping") == 1, process)
    sent.touch()
    process.join(PATIENCE)
    assert process.exitcode == REQUEUE
    assert read_outcome(config.parent / "outcome") == (REQUEUE, "SIGTERM before the first step")
    assert len(opened.read_text().splitlines()) == 2
    assert saved(config) == [] and "Traceback" not in (config.parent / "stderr").read_text()


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_rank_that_waits_for_the_others_to_come_leaves_at_once(command: str, config: Path) -> None:
    if command == "eval":
        assert main(["train", str(config), *LAYOUT, held_out(config), "run.steps=1"]) == 0
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), OUTCOME_VARIABLE: str(config.parent / "outcome")}
    line = [sys.executable, "-m", "lime_dist.cli", command, str(config), *LAYOUT, held_out(config)]
    process = subprocess.Popen(line, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    folder = heartbeat_folder(config.parent / "run")
    while not (folder if command == "train" else folder / "eval").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == REQUEUE and "Traceback" not in errors
    assert read_outcome(config.parent / "outcome") == (REQUEUE, "SIGUSR1 before the ranks had met")


@pytest.mark.slow
def test_launched_ranks_name_the_one_that_was_killed(config: Path) -> None:
    """Their launcher says only that a task was killed, and the others only that a connection broke."""
    environment = {"LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {OUTCOME_VARIABLE: str(config.parent / "outcome"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "lime_dist.cli",
        "train",
        str(config),
        "parallel.pp=3",
        "run.timeout_seconds=60",
    ]
    ranks = [
        subprocess.Popen(command, env=os.environ | environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    while len(trained(config)) < 3:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.05)
    ranks[1].kill()
    errors = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    code, reason = read_outcome(config.parent / "outcome")
    named = r"rank 1 \(pp=1 dp=0 tp=0\) on \S+, stage 1, since step \d+ .*; it has died: its connections are closed"
    assert code == FAILED and re.fullmatch(named, reason)
    assert (ranks[0].returncode, ranks[2].returncode) == (FAILED, FAILED)
    assert re.search(rf"^lime-dist: {named}$", errors[0] + errors[2], re.MULTILINE)


def test_a_command_without_ranks_leaves_at_once(tmp_path: Path) -> None:
    code = "import os\nfrom lime_dist.lifecycle.stopping import leaving_when_asked\nwith leaving_when_asked():\n    os.kill(os.getpid(), 15)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {OUTCOME_VARIABLE: str(tmp_path / "o")},
    )
    assert (result.returncode, result.stderr) == (REQUEUE, "SIGTERM: leaving before the ranks have met\n")
    assert read_outcome(tmp_path / "o") == (REQUEUE, "SIGTERM before the ranks had met")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_terminal_that_goes_save_the_run(number: signal.Signals, config: Path) -> None:
    """They come to the command and its ranks alike."""
    command = [sys.executable, "-m", "lime_dist.cli", "train", str(config), *LAYOUT, "run.steps=100000"]
    hearing = partial(reset_signals, signal.SIG_DFL)
    log = (config.parent / "stderr").open("w")
    process = subprocess.Popen(
        command, stderr=log, stdout=log, cwd=config.parent, preexec_fn=hearing, start_new_session=True
    )
    wait_for(lambda: trained(config)[-1:] > [2], process)
    os.killpg(process.pid, number)
    assert process.wait(PATIENCE) == REQUEUE
    assert saved(config) == [f"step_{trained(config)[-1]:06d}"]
    assert "Traceback" not in (config.parent / "stderr").read_text()


def test_a_terminal_that_takes_no_more_output(config: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "lime_dist.cli", "train", str(config), *LAYOUT, "run.steps=100000"]
    hearing = partial(reset_signals, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=slave, stderr=slave, cwd=config.parent, preexec_fn=hearing, start_new_session=True
    )
    os.close(slave)
    threading.Thread(target=drain, args=(master, process), daemon=True).start()
    wait_for(lambda: trained(config)[-1:] > [2], process)
    os.killpg(process.pid, signal.SIGSTOP)  # so that the terminal goes at one moment
    os.close(master)
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGCONT)
    assert process.wait(PATIENCE) == REQUEUE
    assert saved(config) == [f"step_{trained(config)[-1]:06d}"]


def drain(master: int, process: subprocess.Popen) -> None:
    with suppress(OSError):
        while process.poll() is None:
            os.read(master, 65536)


def test_a_run_under_nohup_goes_on(config: Path) -> None:
    command = [sys.executable, "-m", "lime_dist.cli", "train", str(config), *LAYOUT, "run.steps=100000"]
    ignoring = partial(reset_signals, signal.SIG_IGN)
    process = subprocess.Popen(
        command,
        cwd=config.parent,
        preexec_fn=ignoring,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: trained(config)[-1:] > [2], process)
    os.killpg(process.pid, signal.SIGHUP)
    done = trained(config)[-1]
    wait_for(lambda: trained(config)[-1] > done + 3, process)
    process.terminate()
    assert process.wait(PATIENCE) == REQUEUE


def reset_signals(hang_up: signal.Handlers) -> None:
    """A shell's background job has SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, hang_up)


def wait_for(what: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


# ---- what is left when the power goes


def steps_recorded(metrics: bytes) -> list[int]:
    return sorted({json.loads(line)["step"] for line in metrics.splitlines()})


def test_a_checkpoint_is_never_whole_before_the_records_of_its_steps(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = config.parent / "place"
    place.mkdir()
    journal = Journal(place, config.parent / "events")
    journal.patch(monkeypatch)  # ranks are forked, so they have it
    run = ("train", str(config), f"run.dir={place}/runs/run", "checkpoint.every=1", "run.timeout_seconds=60")
    for last in (2, 4):  # the second start replaces the file
        assert main([*run, f"run.steps={last}"]) == DONE
    sure = {  # at the moment from which on the checkpoint may be there
        event.target.name: steps_recorded(disk.sure["runs"]["run"]["metrics.jsonl"])
        for event, disk in moments(journal)
        if event.target is not None and event.target.name.startswith("step_")
    }
    assert sure == {f"step_{step:06d}": list(range(1, step + 1)) for step in (1, 2, 3, 4)}
