"""Which changes are told, and which are refused where a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from lime_dist.checkpoint.changes import BREAKING, find_changes, require_same_run
from lime_dist.config import Config, check_config, parse_config
from lime_dist.errors import CheckpointError

MODEL = {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96}
OTHER = {
    "data.train": "[{path: a, weight: 2}]",
    "data.seq_length": "64",
    "data.samples": "packed",
    "data.valid_fraction": "0.1",
    "data.global_batch_size": "4",
    "run.seed": "1",
    "run.dtype": "bf16",
    "depth.partial_sum_dtype": "fp32",
}


def config(*overrides: str) -> Config:
    return check_config(parse_config({"model": MODEL, "data": {"train": "a"}}, overrides))


@pytest.mark.parametrize("key", BREAKING)
def test_what_breaks_the_run_is_refused_until_it_is_asked_for(key: str) -> None:
    changed = f"{key}={OTHER[key]}"
    with pytest.raises(
        CheckpointError, match=rf"^{key}: .*, but the run of checkpoint c has .*allow_changes=\[{key}\]$"
    ):
        require_same_run(Path("c"), config(), config(changed), step=0)
    require_same_run(Path("c"), config(), config(changed, f"checkpoint.allow_changes=[{key}]"), step=0)


def test_other_changes_are_told() -> None:
    found = find_changes(config(), config("optim.lr=0.5", "run.steps=7", "spikes.max_skips=1", "run.seed=4"))
    assert [str(change) for change in found] == [
        "run.seed 0 -> 4", "optim.lr 0.001 -> 0.5", "spikes.max_skips 0 -> 1", "run.steps 100 -> 7",
    ]  # fmt: skip


def test_where_and_how_a_run_runs_is_no_change() -> None:
    moved = config(
        "data.train=elsewhere/a", "run.dir=x", "parallel.pp=2", "run.log_every=5", "checkpoint.every=3", "eval.every=2",
        "deepspeed.zero_optimization.stage=1", "depth.policy=relay",
    )  # fmt: skip
    assert find_changes(config(), moved) == []


def test_fewer_steps_than_are_done() -> None:
    require_same_run(Path("c"), config(), config(), step=100)
    with pytest.raises(CheckpointError, match="^run.steps: 100, but checkpoint c has 101 steps done; set more"):
        require_same_run(Path("c"), config(), config(), step=101)
