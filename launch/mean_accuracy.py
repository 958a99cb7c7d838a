"""Accuracies of a task by variant: the mean over seeds, and its standard error, of what `lime-dist eval --task --json` wrote.

python launch/mean_accuracy.py RUN ...      each with accuracy.json; runs are named VARIANT-seedN
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path


def mean_and_error(values: Sequence[float]) -> str:
    """In percent; without an error where there is one value."""
    mean = f"{100 * statistics.mean(values):.1f} %"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def table(accuracies: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """accuracies: of each variant, for each run its accuracy by group."""
    groups = list(next(iter(accuracies.values()))[0])
    rows = [["variant", "seeds", *groups]]
    for variant, runs in accuracies.items():
        rows.append([variant, str(len(runs)), *(mean_and_error([run[group] for run in runs]) for group in groups)])
    return rows


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def main(folders: Sequence[str]) -> None:
    accuracies: dict[str, list[dict[str, float]]] = {}
    for folder in map(Path, folders):
        report = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
        by_group = {f"{group} {report['group']}": part["accuracy"] for group, part in report["groups"].items()}
        variant = folder.name.rpartition("-seed")[0]
        accuracies.setdefault(variant, []).append({**by_group, "all": report["all"]["accuracy"]})
    print_columns(table(accuracies))


if __name__ == "__main__":
    main(sys.argv[1:])
