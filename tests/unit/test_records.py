"""Reading metrics.jsonl: lines that are cut, at either end, are left out."""

from __future__ import annotations

from pathlib import Path

from lime_dist.training.records import read_records


def test_records_are_read_past_a_cut_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_records(file) == []
    file.write_text('{"step": 1, "step_seconds": 2}\n3\n{"step": 2, "step_se')
    assert read_records(file) == [{"step": 1, "step_seconds": 2}]
    assert read_records(file, last_bytes=8) == []
