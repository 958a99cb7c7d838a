"""How early the ranks are told to stop, from what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lime_dist.cluster.lead import bound_lead, plan_stop_lead


def steps(*seconds: float) -> list[dict]:
    return [{"step": number, "step_seconds": value} for number, value in enumerate(seconds, start=1)]


def test_sum_of_the_slowest() -> None:
    records = [*steps(90, 2, 3.5, 2), {"step": 2, "save_seconds": 10}, {"step": 4, "save_seconds": 20}]
    records.append({"step": 4, "eval_loss": 1.0, "eval_seconds": 5})
    assert plan_stop_lead(records, [1])[0] == 2 * 3.5 + 2 * 20 + 5 + 30


def test_first_steps_of_starts_are_left_out() -> None:
    records = steps(90, 2, 80, 3)
    assert plan_stop_lead(records, [1, 3])[0] == 2 * 3 + 30
    assert plan_stop_lead(records, [1])[0] == 2 * 80 + 30


def test_only_the_last_fifty_steps() -> None:
    assert plan_stop_lead(steps(1, 50, *[2] * 50), [1])[0] == 34
    assert plan_stop_lead(steps(1, 50, *[2] * 49), [1])[0] == 130


def test_without_measures_and_the_bound() -> None:
    assert plan_stop_lead([], [1]) == (300, "nothing measured yet")
    assert plan_stop_lead(steps(7), [1])[0] == 300  # a first step tells nothing
    assert bound_lead(300, "nothing measured yet", 86400) == (300, "nothing measured yet")
    lead, source = bound_lead(300, "nothing measured yet", 600)
    assert lead == 200 and "a third of cluster.time" in source


def test_the_script_may_ask(tmp_path: Path) -> None:
    def ask() -> str:
        command = [sys.executable, "-m", "lime_dist.cluster.lead", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert ask() == "300\n"
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in steps(90, 2, 3.5)))
    assert ask() == "37\n"
