"""Figures of `lime-dist analyze` by layer: the mean over seeds of each variant, its standard error, and the difference to the first
variant, paired by seed.

python launch/mean_analyses.py RUN ...      each with analysis.json; runs are named VARIANT-seedN
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mean_accuracy import print_columns

from lime_dist.comparison.estimates import Estimate, estimate, paired_difference

FIGURES = {
    "entropy of values, as attention uses them": ("spectra", "entropy", "values", "mean"),
    "entropy of values before routing": ("spectra", "entropy", "raw_values", "mean"),
    "entropy of hidden states": ("spectra", "entropy", "hidden_states", "mean"),
    "words told apart by values": ("separability", "values", "mean"),
    "words told apart by hidden states": ("separability", "hidden_states", "mean"),
    "share of a layer's sum |R| on itself": ("routers", "own_share"),
    "mean source layer": ("routers", "expected_source"),
}

Reports = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> analysis.json


def read_reports(folders: Sequence[str]) -> Reports:
    reports: Reports = {}
    for folder in map(Path, folders):
        variant, _, seed = folder.name.rpartition("-seed")
        report = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
        reports.setdefault(variant, {})[int(seed)] = report
    return reports


def tables(reports: Reports) -> Iterator[tuple[str, list[list[str]]]]:
    """Title and rows of every figure that any run has."""
    for title, path in FIGURES.items():
        found = {variant: _by_seed(runs, path) for variant, runs in reports.items()}
        found = {variant: runs for variant, runs in found.items() if runs}
        if found:
            yield title, _table(found)


def _by_seed(runs: dict[int, dict[str, Any]], path: Sequence[str]) -> dict[int, list[float | None]]:
    """The figures by layer of each seed that has them."""
    lists: dict[int, Any] = dict(runs)
    for key in path:
        lists = {seed: report[key] for seed, report in lists.items() if report[key] is not None}
    return {seed: figures for seed, figures in lists.items() if any(figure is not None for figure in figures)}


def _table(found: dict[str, dict[int, list[float | None]]]) -> list[list[str]]:
    first, *others = found
    rows = [["layer", *found, *(f"{variant} - {first}" for variant in others)]]
    for layer in range(len(next(iter(found[first].values())))):
        of_layer = {variant: _of_layer(runs, layer) for variant, runs in found.items()}
        means = [estimate(list(values.values())) if values else None for values in of_layer.values()]
        differences = [paired_difference(of_layer[variant], of_layer[first]) for variant in others]
        rows.append([str(layer), *map(_text, means), *map(_text, differences)])
    return rows


def _of_layer(runs: dict[int, list[float | None]], layer: int) -> dict[int, float]:
    return {seed: figure for seed, figures in runs.items() if (figure := figures[layer]) is not None}


def _text(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.3f}" if found.standard_error is None else f"{found.mean:.3f} ± {found.standard_error:.3f}"


def main(folders: Sequence[str]) -> None:
    for title, rows in tables(read_reports(folders)):
        print(f"\n{title}")
        print_columns(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
