"""Ranks that do not fit this machine's memory are refused, or warned of, before they start."""

from __future__ import annotations

import psutil
import pytest

from lime_dist.config import check_config, parse_config
from lime_dist.errors import LayoutError
from lime_dist.plan.run_plan import plan_run
from lime_dist.preflight.devices import all_ranks_bytes, check_memory, compare_memory

MODEL = {"num_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "vocab_size": 1000}


def test_all_ranks_count() -> None:
    layout = ["parallel.tp=2", "parallel.dp=3", "parallel.pp=2", "data.global_batch_size=3"]
    plans = {
        device: plan_run(check_config(parse_config({"model": MODEL, "run": {"device": device}}, layout)))
        for device in ("cpu", "cuda")
    }
    needed = 6 * sum(stage.total_bytes for stage in plans["cpu"].memory)
    assert [all_ranks_bytes(plan) for plan in plans.values()] == [needed, needed]


def test_need_against_what_is_there() -> None:
    assert compare_memory([50, 100], 200, 100, "a rank needs", "its GPU has") is None
    warning = compare_memory([50, 101], 200, 100, "a rank needs", "its GPU has")
    assert warning is not None and warning.startswith("memory: a rank needs about 101 B, its GPU has 100 B free; lower")
    assert compare_memory([200], 200, 100, "a rank needs", "its GPU has") is not None
    with pytest.raises(
        LayoutError, match="^memory: a rank needs about 201 B, its GPU has 200 B; lower data.seq_length"
    ):
        compare_memory([201, 50], 200, 100, "a rank needs", "its GPU has")


def test_a_batch_that_cannot_fit_here() -> None:
    run = {"model": MODEL, "run": {"device": "cpu"}}
    assert check_memory(plan_run(check_config(parse_config(run)))) is None
    tokens = psutil.virtual_memory().total // (4 * MODEL["vocab_size"])  # whose logits fill it
    with pytest.raises(LayoutError, match="^memory: all ranks need about"):
        check_memory(
            plan_run(
                check_config(parse_config(run, [f"data.seq_length={min(tokens, 2**22)}", "data.global_batch_size=64"]))
            )
        )
