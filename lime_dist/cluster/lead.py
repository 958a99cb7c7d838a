"""How long before the time limit the ranks must be told to stop, so that a step and a checkpoint still fit.

Pure, from the records of metrics.jsonl of earlier starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

GRID_SECONDS = 30  # slurmctld looks at time limits only this often
UNMEASURED_SECONDS = 300
_RECENT_STEPS = 50


def plan_stop_lead(records: Iterable[dict[str, Any]], first_steps: Iterable[int], time_seconds: int) -> tuple[int, str]:
    """Seconds before the limit, and where they come from.

    first_steps: the first step of each start, which is slower than others (compilation, first allocations).
    """
    records, slow = list(records), set(first_steps)
    steps = [record for record in records if record.get("step") not in slow]
    step_seconds = _values(steps, "step_seconds")[-_RECENT_STEPS:]
    if step_seconds:
        save, evaluate = (
            max(_values(records, "save_seconds"), default=0),
            max(_values(records, "eval_seconds"), default=0),
        )
        lead = math.ceil(2 * max(step_seconds) + 2 * save + evaluate + GRID_SECONDS)
        source = f"2 steps of {max(step_seconds):.1f} s, 2 saves of {save:.1f} s, evaluation {evaluate:.1f} s, 30 s"
    else:
        lead, source = UNMEASURED_SECONDS, "nothing measured yet"
    if lead > time_seconds // 3:
        return max(1, time_seconds // 3), f"a third of cluster.time, as {lead} s would be more ({source})"
    return lead, source


def _values(records: list[dict[str, Any]], key: str) -> list[float]:
    values = (record.get(key) for record in records)
    return [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
