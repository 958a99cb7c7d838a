"""What a preflight tells: the map, bandwidths beside the plan's bytes, slow boundaries, bad hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lime_dist.config import check_config, parse_config
from lime_dist.errors import ConfigError
from lime_dist.layout import Layout
from lime_dist.plan.run_plan import plan_run
from lime_dist.preflight.commands import exclude
from lime_dist.preflight.fabric import MAX_MESSAGE_BYTES, MIN_MESSAGE_BYTES, Crossing, message_bytes, repetitions
from lime_dist.preflight.summary import (
    bad_lines,
    boundary_reports,
    host_lines,
    measured_step_seconds,
    rank_report,
    report_text,
    slow_boundaries,
)

CONFIG = check_config(
    parse_config(
        {
            "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
            "parallel": {"pp": 4, "dp": 2},
            "pipeline": {"num_microbatches": 3},
            "data": {"seq_length": 16, "global_batch_size": 12},
        }
    ),
    8,
)
PLAN = plan_run(CONFIG)
HOSTS = {rank: f"n{rank // 2 + 1}" for rank in range(8)}


def crossings(*seconds: float) -> list[Crossing]:
    """Both replicas over each boundary, the second's messages twice as slow; `seconds`: of the first's, by boundary."""
    return [
        Crossing(
            boundary=boundary,
            direction=direction,
            rank=2 * (boundary + (direction == "backward")) + replica,
            peer=2 * (boundary + (direction == "forward")) + replica,
            message_bytes=2**20,
            bytes_sent=3 * 2**20,
            seconds=each * (1 + replica),
        )
        for boundary, each in enumerate(seconds)
        for direction in ("forward", "backward")
        for replica in (0, 1)
    ]


def reports(*seconds: float, step_seconds: float | None = None) -> list[dict[str, Any]]:
    return boundary_reports(PLAN, crossings(*seconds), step_seconds)


def test_a_message_is_as_large_as_the_bundle_within_bounds() -> None:
    assert message_bytes(5 * 2**20) == 5 * 2**20
    assert [repetitions(size) for size in (MIN_MESSAGE_BYTES, 16 * 2**20, MAX_MESSAGE_BYTES)] == [9, 4, 3]
    assert message_bytes(10) == MIN_MESSAGE_BYTES and message_bytes(2**40) == MAX_MESSAGE_BYTES


def test_bandwidth_beside_what_the_plan_needs() -> None:
    report = reports(0.1, 0.1, 0.1, step_seconds=0.5)[1]
    assert report["forward"] == report["backward"] == {"min": 2**20 / 0.2, "median": 2**20 / 0.15 * 1.125}
    assert report["bytes_per_step"] == 3 * PLAN.boundary_bytes[1]
    assert report["seconds_per_step"] == pytest.approx(2 * 3 * PLAN.boundary_bytes[1] / (2**20 / 0.2))
    assert report["share_of_step"] == pytest.approx(report["seconds_per_step"] / 0.5)
    assert report["bytes_sent"] == 4 * 3 * 2**20
    assert reports(0.1, 0.1, 0.1)[1]["share_of_step"] is None


def test_a_slow_boundary_is_a_warning_that_names_both_hosts() -> None:
    assert slow_boundaries(reports(0.1, 0.39, 0.1), HOSTS) == []
    (warning,) = slow_boundaries(reports(0.1, 0.41, 0.1), HOSTS)
    assert warning == (
        "boundary 1>2 is slow: 1.2 MiB/s from host n2 (rank 3) to host n3 (rank 5), 5 MiB/s over the median boundary"
    )
    assert slow_boundaries([], HOSTS) == []


def test_the_map_has_a_line_a_host() -> None:
    assert host_lines(rank_report(Layout(pp=3), {0: "n1", 1: "n1", 2: "n2"})) == [
        "n1: ranks 0-1, stages 0-1",
        "n2: rank 2, stage 2",
    ]
    assert host_lines(rank_report(Layout(pp=2, dp=2, tp=2), HOSTS))[:2] == [
        "n1: ranks 0-1, stage 0, replica 0, tensor ranks 0-1",
        "n2: ranks 2-3, stage 0, replica 1, tensor ranks 0-1",
    ]


def test_text() -> None:
    report = {
        "ranks": rank_report(CONFIG.layout, HOSTS),
        "all_reduce_seconds": 0.0021,
        "boundaries": reports(0.1, 0.5, 0.1, step_seconds=0.5),
        "warnings": ["slow"],
    }
    lines = report_text(report).splitlines()
    assert lines[0] == "n1: ranks 0-1, stage 0, replicas 0-1"
    assert "all-reduce of 1 MiB over 8 ranks: 2.1 ms" in lines
    row = next(line for line in lines if line.lstrip().startswith("1>2"))
    assert row.split()[1:5] == ["1", "MiB", "1", "MiB/s"]
    assert lines[-1] == "warning: slow"


def test_the_measured_step_is_the_median_of_the_last(tmp_path: Path) -> None:
    assert measured_step_seconds(tmp_path) is None
    records = [{"step": 1, "step_seconds": 60.0}, {"step": 1, "eval_loss": 3.0}]
    records += [{"step": step, "step_seconds": 0.2 + 0.001 * step} for step in range(2, 23)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 2')
    assert measured_step_seconds(tmp_path) == pytest.approx(0.2125)


def test_bad_hosts_have_a_line_each() -> None:
    assert bad_lines({"n2": ["a", "b"], "": ["rank 3 did not arrive within 9 s"]}) == [
        "host n2 is bad: a; b",
        "rank 3 did not arrive within 9 s (their host is unknown)",
    ]


def test_a_bad_host_is_written_down_once(tmp_path: Path) -> None:
    path = tmp_path / "slurm" / "exclude"
    exclude(path, {"": ["unknown"]})
    assert not path.exists()
    exclude(path, {"n2": ["x"]})
    exclude(path, {"n3": ["x"], "n2": ["x"], "n": ["x"], "": ["unknown"]})
    assert path.read_text() == "n2\nn3\nn\n"


def test_an_exclude_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--exclude-file: .*; give a file that can be written$"):
        exclude(tmp_path, {"n2": ["x"]})
