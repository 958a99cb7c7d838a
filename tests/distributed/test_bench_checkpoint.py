"""The bench of saves end to end: what it measures is there, and what it wrote is gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lime_dist.training.run  # noqa: F401  (what DeepSpeed prints at its first import must not be taken for our output)
from lime_dist.cli.command_line import main
from lime_dist.formats import format_si

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("layout", [(), ("parallel.dp=2", "deepspeed.zero_optimization.stage=1")])
def test_bench_checkpoint(layout: tuple[str, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    command = ["bench", "checkpoint", *layout, "run.device=cpu", "--parameters", "1M", "--rounds", "2"]
    assert main([*command, "--out", str(tmp_path / "disk"), "--json", str(report)]) == 0
    (one,) = json.loads(report.read_text())
    assert one["waited"] < one["written"] and 0 < one["step"] and 0 < one["load"]
    assert one["bytes_written"] <= one["bytes_read"] <= 1.3 * one["bytes_written"], "small tensors are one chunk"
    share = 12 * one["parameters"] / 3 / (2 if layout else 1)
    assert share < one["bytes_written"] < 1.3 * share, "the first stage has the embedding"
    head, _, row = capfd.readouterr().out.strip().splitlines()
    assert row.count("|") == head.count("|") and row.startswith(f"| {format_si(one['parameters'])} |")
    assert list((tmp_path / "disk").iterdir()) == []


def test_sizes(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "checkpoint", "--parameters", "many"])
    assert ended.value.code == 2 and "'many' is not sizes such as 10M,1B" in capfd.readouterr().err
