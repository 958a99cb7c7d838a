"""The power cut at random moments of a run that saves every step: whatever a disk may leave then, the next start loses no
step of a checkpoint that was told of or flushed, and ends as the run that nobody disturbed, to the bit.

The starts after a cut are cut too. `--cases` counts tenths of a cut: a start takes seconds.
"""

from __future__ import annotations

import random
import re
from itertools import islice
from pathlib import Path

import pytest
from disturbed_runs import losses, start, tensors_of, write_inputs
from power_cuts import Disk, Event, Journal, Tree, moments, write_tree

from lime_dist.checkpoint.reader import find_checkpoints

STEPS = 6
CHANCES = (0.0, 0.2, 0.5, 0.8, 1.0)  # that what was not flushed is there
CHECKPOINTS = Path("runs/run/checkpoints")


def steps_flushed(disk: Disk) -> int:
    """Those of the last checkpoint that is sure to be there."""
    node: Tree | bytes = disk.sure
    for name in CHECKPOINTS.parts:
        node = node.get(name, {})
    return max((int(name.removeprefix("step_")) for name in node if name.startswith("step_")), default=0)


def steps_told(event: Event) -> int:
    """Those of the last checkpoint that metrics.jsonl names."""
    metrics = event.before.get("runs", {}).get("run", {}).get("metrics.jsonl", b"")
    told = re.findall(rb'"step": (\d+), "save_seconds"', metrics)
    return int(told[-1]) if told else 0


class Recorded:
    """A run in the folder `place`/runs/run, and where the power may go in it."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str):
        self.run_dir, log = place / "runs/run", place.with_suffix(".log")
        self._journal = Journal(place, place.with_suffix(".events"))
        with monkeypatch.context() as patch:
            self._journal.patch(patch)
            process = start(self.run_dir, log, f"run.steps={STEPS}", "checkpoint.keep=3", *overrides)
            process.join()
        told = log.read_text()
        assert process.exitcode == 0, told
        resumed = re.search(r"^resumed from \S+, step (\d+) of", told, re.MULTILINE)
        self.first_step = int(resumed[1]) if resumed else 0
        self._weights = []
        for event, disk in moments(self._journal):
            assert steps_told(event) <= steps_flushed(disk), "a save was told of that is not sure to be there"
            self._weights.append(4 if event.path.is_relative_to(CHECKPOINTS) else 1)

    def cut(self, draw: random.Random) -> tuple[Tree, int]:
        """What is left, and how many steps of the run have to be."""
        index = draw.choices(range(len(self._weights)), self._weights)[0]
        _, disk = next(islice(moments(self._journal), index, None))
        return disk.left(draw, draw.choice(CHANCES)), steps_flushed(disk)


@pytest.mark.campaign
@pytest.mark.timeout(0)
@pytest.mark.parametrize("behind", [False, True])
def test_cut_and_resumed(
    behind: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cases: int, case_seed: int
) -> None:
    """behind: saves that are written while training goes on."""
    write_inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole").mkdir()
    saves = f"checkpoint.asynchronous={str(behind).lower()}"
    draw, cuts = random.Random(case_seed), max(1, num_cases // 10)
    whole = last = Recorded(tmp_path / "whole", monkeypatch, saves)
    for number in range(cuts):
        left, steps = draw.choice((whole, last)).cut(draw)
        write_tree(tmp_path / f"cut_{number}", left)
        last = Recorded(tmp_path / f"cut_{number}", monkeypatch, saves)
        assert last.first_step >= steps
        newest, expected = (find_checkpoints(run.run_dir / "checkpoints")[-1] for run in (last, whole))
        assert newest.name == expected.name
        assert tensors_of(newest) == tensors_of(expected)
        assert losses(last.run_dir) == losses(whole.run_dir)
    print(f"{cuts} cuts")
