"""Each command plans its run once and hands the plan on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.cli.command_line import main
from lime_dist.config import Config, load_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.plan import run_plan, stages
from lime_dist.plan.run_plan import plan_run
from lime_dist.preflight.devices import check_memory

RUN = {
    "model": {"num_layers": 8, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"pp": 4},
    "pipeline": {"num_microbatches": 8, "warmup": "auto"},
    "data": {"train": "train", "seq_length": 8, "global_batch_size": 8},
    "run": {"device": "cpu"},
}
CLUSTER = {"nodes": 2, "tasks_per_node": 2, "time": "02:00:00", "gpus_per_node": 2, "gpu_memory": "1GiB"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    Path("cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    with IndexedWriter(Path("train"), vocab_size=96) as writer:
        writer.add_document(np.arange(500) % 96)
        writer.commit({"vocab_size": 96, "tokens": 500})


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of each chunk that was planned, in order."""
    numbers: list[int] = []
    plan_chunk = stages._plan_chunk

    def count(config: Config, transfer, shape, chunk: int) -> stages.ChunkPlan:
        numbers.append(chunk)
        return plan_chunk(config, transfer, shape, chunk)

    monkeypatch.setattr(stages, "_plan_chunk", count)
    return numbers


@pytest.mark.parametrize(
    "command",
    [
        "plan run.yaml",
        "plan run.yaml --json --plot plan.svg",
        "plan run.yaml run.memory=1GiB",
        "plan run.yaml parallel.virtual_stages=2 --json",
        "train run.yaml --dry-run",
        "submit run.yaml --cluster cluster.yaml --dry-run",
    ],
)
def test_a_command_plans_its_chunks_once(command: str, planned: list[int]) -> None:
    assert main(command.split()) == 0
    assert planned == [*range(8 if "virtual" in command else 4)]


def test_the_check_of_memory_reads_the_plan(planned: list[int]) -> None:
    plan = ready_plan(load_config(Path("run.yaml"), ["run.device=auto"]))
    assert check_memory(plan) is None
    assert planned == [*range(4)]


def test_a_notebooks_plan_is_planned_once(planned: list[int]) -> None:
    from lime_dist.api import build_plan

    plan = build_plan(load_config(Path("run.yaml"), []))
    assert "stage" in str(plan) and len(plan["stages"]) == 4
    assert planned == [*range(4)]


def test_warmups_that_are_tried_share_their_chunks() -> None:
    plan = plan_run(load_config(Path("run.yaml"), []))
    tried = [*run_plan.replan_warmups(plan, [None, 5, 7])]
    assert [[sum(peak.values()) for peak in one.stages[0].moments] for one in tried] == [[4], [5], [7]]
    for one in tried:
        assert all(own is known for own, known in zip(one.chunks, plan.chunks, strict=True))
