"""How long before the time limit the ranks must be told to stop, so that a step and a checkpoint still fit.

The batch script asks for it anew in every start: `python -m lime_dist.cluster.lead RUN` prints the seconds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lime_dist.cluster.history import read_history
from lime_dist.training.records import read_records

CLOCK_SECONDS = 30  # the script and slurmctld look at time limits only this often
UNMEASURED_SECONDS = 300
_RECENT_STEPS = 50
_READ_BYTES = 1 << 24  # of the end of metrics.jsonl


def measure_lead(run_dir: Path) -> tuple[int, str]:
    """Seconds before the limit, and where they come from: the records of the run's earlier steps."""
    starts = [event.step for event in read_history(run_dir / "slurm" / "history.tsv") if event.kind == "start"]
    return plan_stop_lead(read_records(run_dir / "metrics.jsonl", _READ_BYTES), [step + 1 for step in (0, *starts)])


def plan_stop_lead(records: Iterable[dict[str, Any]], first_steps: Iterable[int]) -> tuple[int, str]:
    """Seconds before the limit, and where they come from.

    first_steps: the first step of each start, which is slower than others (compilation, first allocations).
    """
    records, slow = list(records), set(first_steps)
    steps = [record for record in records if record.get("step") not in slow]
    step_seconds = _values(steps, "step_seconds")[-_RECENT_STEPS:]
    if not step_seconds:
        return UNMEASURED_SECONDS, "nothing measured yet"
    step, save, evaluate = max(step_seconds), _longest(records, "save_seconds"), _longest(records, "eval_seconds")
    lead = math.ceil(2 * step + 2 * save + evaluate + CLOCK_SECONDS)
    return lead, f"2 steps of {step:.1f} s, 2 saves of {save:.1f} s, evaluation {evaluate:.1f} s, {CLOCK_SECONDS} s"


def bound_lead(lead: int, source: str, time_seconds: int) -> tuple[int, str]:
    """At most a third of the time: the batch script does the same with the time that is left."""
    if lead <= time_seconds // 3:
        return lead, source
    return max(1, time_seconds // 3), f"a third of cluster.time, as {lead} s would be more ({source})"


def _longest(records: list[dict[str, Any]], key: str) -> float:
    return max(_values(records, key), default=0.0)


def _values(records: list[dict[str, Any]], key: str) -> list[float]:
    values = (record.get(key) for record in records)
    return [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]


if __name__ == "__main__":
    print(measure_lead(Path(sys.argv[1]))[0])
