"""A report as text: its sentences, and a table by layer. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lime_dist.analysis.loss_curve import curve_lines
from lime_dist.formats import format_bytes

_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (  # head, where in the report, form
    ("own share", ("routers", "own_share"), "{:.0%}"),
    ("mean source", ("routers", "expected_source"), "{:.1f}"),
    ("S hidden", ("spectra", "entropy", "hidden_states", "mean"), "{:.2f}"),
    ("S values", ("spectra", "entropy", "values", "mean"), "{:.2f}"),
    ("S raw values", ("spectra", "entropy", "raw_values", "mean"), "{:.2f}"),
    ("rank values", ("spectra", "effective_rank", "values", "mean"), "{:.1f}"),
    ("probe hidden", ("separability", "hidden_states", "mean"), "{:.0%}"),
    ("probe values", ("separability", "values", "mean"), "{:.0%}"),
)


def screen(report: dict[str, Any]) -> str:
    """S: matrix-based Renyi entropy in nats; rank: effective rank; probe: accuracy. Below, the loss curve and the router map."""
    rows = layer_rows(report)
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    pictures = [*_curve_lines(report), *_map_lines(report)]
    return "\n".join([report["checkpoint"], *report["sentences"], "", *lines, *pictures])


def _curve_lines(report: dict[str, Any]) -> list[str]:
    return ["", *curve_lines(report["loss_curve"])] if report["loss_curve"] else []


_SHADES = " ░▒▓█"
_MAX_MAPPED_LAYERS = 48  # more do not fit a terminal


def _map_lines(report: dict[str, Any]) -> list[str]:
    """Mean |R|, a row a reader, two letters a source, as shares of the largest in the row."""
    if not report["routers"] or report["model"]["num_layers"] > _MAX_MAPPED_LAYERS:
        return []
    rows = report["routers"]["mean"]
    shares = ", ".join(f"{shade} {index / (len(_SHADES) - 1):.0%}" for index, shade in enumerate(_SHADES) if index)
    head = f"router map: |R| of each reader (down) by source (across), of the largest in its row: {shares}"
    across = "".join(f"{source:<2}" for source in range(len(rows)))
    readers = [reader for reader, row in enumerate(rows) if any(value is not None for value in row)]
    return ["", head, f"       {across}".rstrip(), *(f"{reader:>5}  {_shaded(rows[reader])}" for reader in readers)]


def _shaded(row: Sequence[float | None]) -> str:
    largest = max((value for value in row if value is not None), default=0.0) or 1.0
    steps = len(_SHADES) - 1
    return "".join("  " if value is None else 2 * _SHADES[round(value / largest * steps)] for value in row).rstrip()


def layer_rows(report: dict[str, Any]) -> list[list[str]]:
    """A head and a row a layer; what the run does not have is a dash, a column of dashes is left out."""
    columns = [["layer", *map(str, range(report["model"]["num_layers"]))]]
    for head, place, form in _COLUMNS:
        figures: Any = report
        for key in place:
            figures = figures and figures[key]
        if figures and any(value is not None for value in figures):
            columns.append([head, *("-" if value is None else form.format(value) for value in figures)])
    return [list(row) for row in zip(*columns)]


def edge_rows(report: dict[str, Any]) -> list[list[str]]:
    """A head and a row for each rule of what is kept."""
    rows = [["kept", "edges", "share of |R|", "largest bundle", "held-out loss"]]
    for kept in report["edges"] or ():
        size = kept["largest_bundle_bytes"]
        rows.append(
            [
                kept["rule"],
                str(kept["edges"]),
                f"{kept['weight_share']:.0%}",
                "-" if size is None else format_bytes(size),
                f"{kept['loss']:.4f}",
            ]
        )
    return rows
