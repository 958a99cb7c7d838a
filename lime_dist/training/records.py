"""Reading a run's metrics.jsonl, which `metrics.py` writes. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECENT_BYTES = 1 << 16  # of the file's end: more than the recent steps take


def read_records(metrics: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """The records of the file, or of its end; none when it is not there. Lines that are cut are left out."""
    try:
        with metrics.open("rb") as file:
            file.seek(0 if last_bytes is None else max(0, metrics.stat().st_size - last_bytes))
            lines = file.read().splitlines()
    except OSError:
        return []
    return [record for line in lines if isinstance(record := _parse(line), dict)]


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
