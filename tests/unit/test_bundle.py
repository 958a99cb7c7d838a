"""What crosses each boundary, in bytes, counted here by hand."""

from __future__ import annotations

import pytest

from lime_dist.config import Config, check_config, parse_config
from lime_dist.plan.messages import Cargo
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.schedule import Kind

BASE = {
    "model": {
        "num_layers": 6, "hidden_size": 48, "intermediate_size": 64, "num_heads": 6, "num_kv_heads": 2, "vocab_size": 50,
    },
    "pipeline": {"num_microbatches": 4, "partition": [1, 4, 1], "min_message": 0},
    "parallel": {"pp": 3},
    "data": {"seq_length": 5, "global_batch_size": 12},
}  # fmt: skip
RESIDUAL = 48  # elements a row: hidden_size
ENTRY = 2 * 2 * 8  # elements a row: K and V, two heads of 48 / 6


def make_config(*overrides: str) -> Config:
    config = parse_config(BASE, overrides)
    return check_config(config, config.layout.world_size)


BYTES = [  # overrides, rows, bytes of the residual's elements, entries over each boundary, sums, bytes of their elements
    ("", 15, 4, [1, 0], [0, 1], 4),
    ("depth.policy=relay", 15, 4, [1, 5], [0, 0], 4),
    ("depth.policy=relay depth.pattern=last:1", 15, 4, [1, 1], [0, 0], 4),
    ("depth.router=none", 15, 4, [0, 0], [0, 0], 4),
    ("run.dtype=bf16", 15, 2, [1, 0], [0, 1], 2),
    ("run.dtype=bf16 depth.partial_sum_dtype=fp32", 15, 2, [1, 0], [0, 1], 4),
    ("parallel.tp=2", 8, 4, [1, 0], [0, 1], 4),  # 15 rows rounded up to a multiple of tp
    ("parallel.tp=2 parallel.dp=2 pipeline.num_microbatches=3", 5, 4, [1, 0], [0, 1], 4),
    ("parallel.dp=3", 5, 4, [1, 0], [0, 1], 4),
]


@pytest.mark.parametrize(("overrides", "rows", "width", "entries", "sums", "sum_width"), BYTES)
def test_bundle_bytes(
    overrides: str, rows: int, width: int, entries: list[int], sums: list[int], sum_width: int
) -> None:
    plans = plan_run(make_config(*overrides.split())).chunks
    expected = [
        rows * (width * (RESIDUAL + raw * ENTRY) + sum_width * partial * ENTRY) for raw, partial in zip(entries, sums)
    ]
    assert [len(plan.transfer.sent.raw_entries) for plan in plans] == [*entries, 0]
    assert [len(plan.transfer.sent.partial_sums) for plan in plans] == [*sums, 0]
    assert [plan.sent_bytes for plan in plans] == [*expected, 0]
    assert [plan.received_bytes for plan in plans] == [0, *expected]


def test_entries_passed_on_are_one_message_and_those_made_leave_at_their_layers() -> None:
    plans = plan_run(make_config("depth.policy=relay")).chunks
    sent = [
        [(message.leaves, message.layers) for message in plan.sent[Kind.FORWARD] if message.cargo is Cargo.ENTRIES]
        for plan in plans
    ]
    assert sent == [[(0, (0,))], [("before", (0,)), (1, (1,)), (2, (2,)), (3, (3,)), (4, (4,))], []]
    entry_bytes = plans[0].shape.entry_bytes
    assert [plan.held_bytes for plan in plans] == [1 * entry_bytes, 5 * entry_bytes, 6 * entry_bytes]


def test_stages_know_their_place_and_their_actions() -> None:
    plans = plan_run(make_config()).stages
    assert [plan.is_first_stage for plan in plans] == [True, False, False]
    assert [plan.is_last_stage for plan in plans] == [False, False, True]
    assert [plan.layers for plan in plans] == [(0,), (1, 2, 3, 4), (5,)]
    assert [plan.peak_in_flight for plan in plans] == [3, 2, 1]
    assert [len(plan.actions) for plan in plans] == [8, 8, 8]
