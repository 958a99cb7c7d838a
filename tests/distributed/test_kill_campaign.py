"""All ranks of a run killed at random moments, most of them within a save: every checkpoint that is there is whole, and the
run that is started again ends as one that nobody disturbed, to the bit.

`--cases` counts tenths of a kill: a start takes seconds.
"""

from __future__ import annotations

import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from disturbed_runs import losses, start, tensors_of, write_inputs

from lime_dist.checkpoint.reader import find_checkpoints

STEPS_PER_KILL = 6  # at most so many saves pass before a kill
START_SECONDS = 60


def kill_all(process: BaseProcess) -> None:
    """The whole group at once; on return none of it is left."""
    group = process.pid
    os.killpg(group, signal.SIGKILL)
    process.join()
    try:
        while True:
            os.killpg(group, signal.SIGKILL)
            time.sleep(0.01)
    except ProcessLookupError:
        pass


def wait_for_a_save(process: BaseProcess, checkpoints: Path, count: int) -> None:
    """Return as the `count`-th save from now begins."""
    begun: set[str] = set()
    deadline = time.monotonic() + START_SECONDS
    while len(begun) < count and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
        if checkpoints.is_dir():
            begun |= {name for name in os.listdir(checkpoints) if name.startswith(".unfinished-step_")}


def kill_at_random(process: BaseProcess, checkpoints: Path, draw: random.Random) -> None:
    """Three of four within a save or right behind it, the others anywhere, the start included."""
    if draw.random() < 0.75:
        wait_for_a_save(process, checkpoints, draw.randint(1, STEPS_PER_KILL))
        time.sleep(draw.choice((0.0, 0.002, 0.005, 0.01, 0.02, 0.05)) * draw.random())
    else:
        time.sleep(draw.uniform(0.0, 6.0))
    assert process.is_alive(), "the run has ended by itself"
    kill_all(process)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.campaign
@pytest.mark.timeout(0)
@pytest.mark.parametrize("behind", [False, True])
def test_killed_and_resumed(behind: bool, folder: Path, num_cases: int, case_seed: int) -> None:
    """behind: saves that are written while training goes on."""
    saves = f"checkpoint.asynchronous={str(behind).lower()}"
    draw, kills = random.Random(case_seed), max(1, num_cases // 10)
    steps = f"run.steps={STEPS_PER_KILL * kills + 100}"
    whole, killed = folder / "whole", folder / "killed"
    undisturbed = start(whole, folder / "whole.log", steps, "checkpoint.keep=100000")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    interrupted_saves = 0
    for _ in range(kills):
        process = start(killed, folder / "killed.log", steps, saves, "checkpoint.keep=3")
        kill_at_random(process, killed / "checkpoints", draw)
        interrupted_saves += any((killed / "checkpoints").glob(".unfinished-step_*"))
        for checkpoint in find_checkpoints(killed / "checkpoints"):
            assert tensors_of(checkpoint) == tensors_of(whole / "checkpoints" / checkpoint.name)
    print(f"{kills} kills, {interrupted_saves} left an unfinished save")
    assert interrupted_saves > 0 or kills < 5
    last = start(killed, folder / "killed.log", steps, saves, "checkpoint.keep=3")
    last.join()
    assert last.exitcode == 0
    newest = find_checkpoints(killed / "checkpoints")[-1]
    assert tensors_of(newest) == tensors_of(find_checkpoints(whole / "checkpoints")[-1])
    assert losses(killed) == losses(whole)
