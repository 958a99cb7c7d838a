"""How early the ranks are told to stop, from what was measured."""

from __future__ import annotations

from lime_dist.cluster.lead import plan_stop_lead

DAY = 86400


def steps(*seconds: float) -> list[dict]:
    return [{"step": number, "step_seconds": value} for number, value in enumerate(seconds, start=1)]


def test_sum_of_the_slowest() -> None:
    records = [*steps(90, 2, 3.5, 2), {"step": 2, "save_seconds": 10}, {"step": 4, "save_seconds": 20}]
    records.append({"step": 4, "eval_loss": 1.0, "eval_seconds": 5})
    assert plan_stop_lead(records, [1], DAY)[0] == 2 * 3.5 + 2 * 20 + 5 + 30


def test_first_steps_of_starts_are_left_out() -> None:
    records = steps(90, 2, 80, 3)
    assert plan_stop_lead(records, [1, 3], DAY)[0] == 2 * 3 + 30
    assert plan_stop_lead(records, [1], DAY)[0] == 2 * 80 + 30


def test_only_the_last_fifty_steps() -> None:
    assert plan_stop_lead(steps(1, 50, *[2] * 50), [1], DAY)[0] == 34
    assert plan_stop_lead(steps(1, 50, *[2] * 49), [1], DAY)[0] == 130


def test_without_measures_and_the_bound() -> None:
    assert plan_stop_lead([], [1], DAY) == (300, "nothing measured yet")
    assert plan_stop_lead(steps(7), [1], DAY)[0] == 300  # a first step tells nothing
    lead, source = plan_stop_lead([], [1], 600)
    assert lead == 200 and "a third of cluster.time" in source
