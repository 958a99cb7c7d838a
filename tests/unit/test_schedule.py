"""Schedules are torch's, send what is received in the same order, and cannot deadlock."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from lime_dist.errors import ConfigError
from lime_dist.plan.schedule import SCHEDULE_NAMES, Action, Kind, peak_in_flight, plan_forward_only, plan_schedule

TORCH = {"1f1b": torch_schedules.Schedule1F1B, "gpipe": torch_schedules.ScheduleGPipe}
SHAPES = [(stages, microbatches) for stages in (1, 2, 3, 4, 5, 8) for microbatches in (1, 2, 3, 4, 5, 8, 16)]


def plan_all(name: str, num_stages: int, num_microbatches: int) -> list[list[Action]]:
    return [
        plan_schedule(name, stage_index=stage, num_stages=num_stages, num_microbatches=num_microbatches)
        for stage in range(num_stages)
    ]


def torch_order(name: str, num_stages: int, num_microbatches: int) -> list[str]:
    """Forward and backward passes of each stage in torch's order, such as FFBFBB; idle steps and the like left out.

    Without microbatch numbers: those that torch 2.13 gives the forwards of 1F1B's last stage begin at 1.
    """
    schedule = object.__new__(TORCH[name])  # its constructor asks for a process group
    schedule._num_stages, schedule._n_microbatches = num_stages, num_microbatches
    order = schedule._get_pipeline_order()
    kinds = {torch_schedules.FORWARD: "F", torch_schedules.FULL_BACKWARD: "B"}
    return [
        "".join(kinds.get(action.computation_type, "") for action in order[stage] if action is not None)
        for stage in range(num_stages)
    ]


# torch refuses 1F1B of fewer microbatches than stages
KNOWN_TO_TORCH = [
    (name, *shape) for name in SCHEDULE_NAMES for shape in SHAPES if name != "1f1b" or shape[1] >= shape[0]
]


@pytest.mark.parametrize(("name", "num_stages", "num_microbatches"), KNOWN_TO_TORCH)
def test_order_is_torchs(name: str, num_stages: int, num_microbatches: int) -> None:
    ours = [
        "".join(action.kind.value for action in actions) for actions in plan_all(name, num_stages, num_microbatches)
    ]
    assert ours == torch_order(name, num_stages, num_microbatches)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_every_microbatch_passes_once_each_way_in_order(name: str, num_stages: int, num_microbatches: int) -> None:
    for actions in plan_all(name, num_stages, num_microbatches):
        for kind in Kind:
            assert [a.microbatch_index for a in actions if a.kind is kind] == list(range(num_microbatches))
        for index in range(num_microbatches):
            assert actions.index(Action(Kind.FORWARD, index)) < actions.index(Action(Kind.BACKWARD, index))


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_messages_pair_up_in_order_and_nothing_deadlocks(name: str, num_stages: int, num_microbatches: int) -> None:
    """Every stage goes on as soon as what it waits for has been sent; a link hands out messages in the order sent."""
    plans = plan_all(name, num_stages, num_microbatches)
    links: dict[tuple[int, int], list[int]] = {(s, s + d): [] for s in range(num_stages) for d in (-1, 1)}
    done = [0] * num_stages
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(plans):
            if done[stage] == len(actions):
                continue
            action = actions[done[stage]]
            step = 1 if action.kind is Kind.FORWARD else -1
            source, target = stage - step, stage + step
            if 0 <= source < num_stages:
                if not links[source, stage]:
                    continue
                assert links[source, stage].pop(0) == action.microbatch_index
            if 0 <= target < num_stages:
                links[stage, target].append(action.microbatch_index)
            done[stage] += 1
            moved = True
    assert done == [len(actions) for actions in plans], "deadlock"
    assert not any(links.values()), "sent and never received"


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SHAPES)
def test_1f1b_holds_no_more_than_the_stages_to_come(num_stages: int, num_microbatches: int) -> None:
    peaks = {name: list(map(peak_in_flight, plan_all(name, num_stages, num_microbatches))) for name in SCHEDULE_NAMES}
    assert peaks["1f1b"] == [min(num_microbatches, num_stages - stage) for stage in range(num_stages)]
    assert peaks["gpipe"] == [num_microbatches] * num_stages


def test_forward_only_and_unknown_names() -> None:
    assert [str(action) for action in plan_forward_only(3)] == ["F0", "F1", "F2"]
    with pytest.raises(ConfigError, match="^pipeline.schedule: 'zb' is unknown; use one of 1f1b, gpipe"):
        plan_schedule("zb", stage_index=0, num_stages=1, num_microbatches=1)
