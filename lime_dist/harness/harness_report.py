"""What lm-eval found of a checkpoint: a table, JSON, a file in the run's folder and a point in its TensorBoard."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_dist.checkpoint.reader import step_folder
from lime_dist.data.output_files import written_whole

# Of lm-eval's own results; the rest is the tasks' whole configuration.
_KEPT = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better")
_MAX_NAME = 100


@dataclass(frozen=True, kw_only=True)
class Measure:
    """metric: with its filter behind it, where it has one. value, stderr: None where it is no finite number."""

    task: str
    metric: str
    value: float | None
    stderr: float | None
    num_examples: int


@dataclass(frozen=True, kw_only=True)
class HarnessReport:
    """asked: the tasks as given. facts: what else there is to know of the evaluation, such as `limit`. found: lm-eval's results."""

    asked: str
    checkpoint: Path
    step: int
    facts: Mapping[str, Any]
    found: Mapping[str, Any]

    def measures(self) -> Iterator[Measure]:
        for task, values in self.found["results"].items():
            for key, value in values.items():
                metric, comma, filter_name = key.partition(",")
                if not comma or metric.endswith("_stderr"):
                    continue
                yield Measure(
                    task=task,
                    metric=metric if filter_name == "none" else f"{metric}.{filter_name}",
                    value=_number(value),
                    stderr=_number(values.get(f"{metric}_stderr,{filter_name}")),
                    num_examples=values.get("sample_len", 0),
                )

    def report(self) -> dict[str, Any]:
        found = {key: _plain(self.found[key]) for key in _KEPT if key in self.found}
        return {"checkpoint": str(self.checkpoint), "step": self.step, **self.facts, **found}

    @property
    def variant(self) -> str:
        """What keeps a quick look, or another number of examples in the prompts, apart from the whole evaluation."""
        parts = {"limit": self.facts["limit"], "fewshot": self.facts["num_fewshot"]}
        return "".join(f"-{name}{value}" for name, value in parts.items() if value is not None)

    def __str__(self) -> str:
        measures = list(self.measures())
        tasks, metrics = (max(map(len, names)) for names in self._names(measures))
        lines = [f"lm-eval {self.facts['lm_eval_version']}, by {self.checkpoint}"]
        lines += [f"{'task':<{tasks}}  {'metric':<{metrics}}  {'value':>10}  {'':>10}  {'n':>7}"]
        for one in measures:
            error = f"± {_fixed(one.stderr)}" if one.stderr is not None else ""
            lines += [
                f"{one.task:<{tasks}}  {one.metric:<{metrics}}  {_fixed(one.value):>10}  {error:<10}  {one.num_examples:>7,}"
            ]
        return "\n".join(lines)

    @staticmethod
    def _names(measures: list[Measure]) -> tuple[list[str], list[str]]:
        return ["task", *(one.task for one in measures)], ["metric", *(one.metric for one in measures)]


def _number(value: Any) -> float | None:
    """numpy has numbers of its own, and lm-eval says N/A."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _fixed(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 10_000 else f"{value:.3e}"


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, and null where lm-eval writes N/A."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return None if value == "N/A" else value
    return _number(value)


def save_report(report: HarnessReport, run: Path) -> Path:
    """RUN/harness/step_N-TASKS.json, in place of an earlier one of the same. Raises: OSError."""
    folder = run / "harness"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step_folder(folder, report.step).name}-{_file_name(report.asked)}{report.variant}.json"
    with written_whole(path) as partial:
        partial.write_text(json.dumps(report.report(), allow_nan=False, indent=2) + "\n", encoding="utf-8")
    return path


def _file_name(asked: str) -> str:
    name = re.sub(r"[^\w.+-]", "_", asked.replace(",", "+"))
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def chart_report(report: HarnessReport, run: Path) -> None:
    """harness/TASK/METRIC at the checkpoint's step. Raises: OSError.

    In a folder of its own: TensorBoard leaves a file of events when a newer one appears beside it, which would hide what a
    run that still trains goes on to write.
    """
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(run / "tensorboard" / f"harness{report.variant}"))
    for one in report.measures():
        if one.value is not None:
            board.add_scalar(f"harness/{one.task}/{one.metric}", one.value, report.step)
    board.close()
