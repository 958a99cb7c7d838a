"""The plots of one report, or of several over each other, and the page that holds them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lime_dist.analysis.text_report import edge_rows, layer_rows
from lime_dist.pictures import heading, heatmap, panels, paragraph, table, to_page, to_svg

_MAX_HEADS = 32  # of the grid
_NAMES = {"hidden_states": "hidden states", "values": "values", "raw_values": "raw values"}
_LINES = {"hidden_states": "-", "values": "--", "raw_values": ":"}


def page(reports: Sequence[dict[str, Any]]) -> str:
    """HTML of reports of `report.analyze`: curves of several runs in the same plots, each run's own maps below."""
    names = [report["run"] for report in reports]
    parts = []
    for name, report in zip(names, reports):
        parts += [heading(name), *map(paragraph, report["sentences"])]
    parts += [heading("Curves"), to_svg(_curves(names, reports))]
    for name, report in zip(names, reports):
        if report["routers"]:
            parts += [heading(f"Router maps of {name}"), paragraph(_MAPS), to_svg(_maps(report["routers"]))]
        if report["edges"]:
            parts += [heading(f"Edges of {name}"), paragraph(_EDGES), table(*_split(edge_rows(report)))]
        parts += [heading(f"Figures by layer of {name}"), table(*_split(layer_rows(report)))]
    return to_page(f"Analysis of {', '.join(names)}", parts)


_MAPS = (
    "|R| by reader (down) and source (across), both by layer; first the mean over all heads, then by head of the reader. "
    "Of v1, softmax weights in place of |R|. Each map has a scale of its own."
)
_EDGES = (
    "Held-out loss when the other edges are cut from the trained routers, without training on: training with fewer edges from the "
    "start costs far less (DenseFormer, arXiv 2402.02622)."
)


def _split(rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return rows[0], rows[1:]


# ---- curves


def _curves(names: Sequence[str], reports: Sequence[dict[str, Any]]) -> Figure:
    plots: list[Any] = [_loss] if any(report["loss_curve"] for report in reports) else []
    plots += [_entropy, _effective_rank]
    plots += [_separability] if any(report["separability"] for report in reports) else []
    plots += [_own_share, _expected_source, _loss_by_edges] if any(report["routers"] for report in reports) else []
    figure, axes = panels(len(plots))
    for plot, place in zip(plots, axes):
        for index, (name, report) in enumerate(zip(names, reports)):
            plot(place, report, f"{name}: " if len(names) > 1 else "", f"C{index}" if len(names) > 1 else None)
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize="small")
    return figure


def _loss(axes: Axes, report: dict[str, Any], name: str, color: str | None) -> None:
    axes.set(title="Loss of the run", xlabel="step", ylabel="nats a token")
    for (kind, points), style in zip((report["loss_curve"] or {}).items(), ("-", "--")):
        axes.plot(*zip(*points), style, label=f"{name}{kind.replace('_', '-')}", color=color)


def _entropy(axes: Axes, report: dict[str, Any], name: str, color: str | None) -> None:
    axes.set(title=f"Matrix Renyi entropy, alpha {report['spectra']['alpha']}", xlabel="layer", ylabel="nats")
    _bands(axes, report["spectra"]["entropy"], name, color)


def _effective_rank(axes: Axes, report: dict[str, Any], name: str, color: str | None) -> None:
    axes.set(title="Effective rank", xlabel="layer")
    _bands(axes, report["spectra"]["effective_rank"], name, color)


def _separability(axes: Axes, report: dict[str, Any], name: str, color: str | None) -> None:
    found = report["separability"]
    axes.set(title="is / are / was / were told apart", xlabel="layer", ylabel="accuracy")
    if found:
        axes.axhline(found["chance"], color="gray", linewidth=0.8)
        _bands(axes, {kind: found[kind] for kind in _NAMES if kind in found}, name, color)


def _bands(axes: Axes, kinds: dict[str, dict[str, list]], name: str, color: str | None) -> None:
    """Mean, and a deviation to either side. Raw values are drawn where some are not the values themselves."""
    for kind, figures in kinds.items():
        mean, std = _numbers(figures["mean"]), _numbers(figures["std"])
        if numpy.isnan(mean).all() or (kind == "raw_values" and figures == kinds["values"]):
            continue
        layers = numpy.arange(len(mean))
        (line,) = axes.plot(layers, mean, _LINES[kind], label=f"{name}{_NAMES[kind]}", color=color, marker=".")
        axes.fill_between(layers, mean - std, mean + std, color=line.get_color(), alpha=0.12, linewidth=0)


def _own_share(axes: Axes, report: dict[str, Any], name: str, color: str | None) -> None:
    axes.set(title="Share of |R| on the own layer", xlabel="reader", ylim=(0, 1))
    if report["routers"]:
        axes.plot(
            _numbers(report["routers"]["own_share"]), label=name.removesuffix(": ") or None, color=color, marker="."
        )


def _expected_source(axes: Axes, report: dict[str, Any], name: str, color: str | None) -> None:
    axes.set(title="Mean source layer, weighed by |R|", xlabel="reader", ylabel="layer")
    if report["routers"]:
        found = _numbers(report["routers"]["expected_source"])
        axes.plot([0, len(found) - 1], [0, len(found) - 1], color="gray", linewidth=0.8)
        axes.plot(found, label=name.removesuffix(": ") or None, color=color, marker=".")


def _loss_by_edges(axes: Axes, report: dict[str, Any], name: str, color: str | None) -> None:
    axes.set(title="Held-out loss, heaviest edges kept", xlabel="share of edges kept", ylabel="nats")
    if not report["edges"]:
        return
    total = report["model"]["edges"]
    places = {
        rule: [(kept["edges"] / total, kept["loss"]) for kept in report["edges"] if kept["rule"].startswith(rule)]
        for rule in ("heaviest", "top_p", "budget")
    }
    for marker, (rule, points) in zip(".xs", places.items()):
        if points:
            axes.plot(
                *zip(*points), "-" if rule == "heaviest" else "", marker=marker, label=f"{name}{rule}", color=color
            )


def _numbers(row: Sequence[float | None]) -> numpy.ndarray:
    return numpy.array([numpy.nan if value is None else value for value in row], dtype=float)


# ---- maps


def _maps(routers: dict[str, Any]) -> Figure:
    heads = [_matrix(head) for head in routers["by_head"][:_MAX_HEADS]]
    maps = [("all heads", _matrix(routers["mean"])), *((f"head {index}", head) for index, head in enumerate(heads))]
    figure, axes = panels(len(maps), columns=4)
    for place, (title, values) in zip(axes, maps):
        heatmap(figure, place, values, title=title, across="source", down="reader")
    return figure


def _matrix(rows: Sequence[Sequence[float | None]]) -> numpy.ndarray:
    return numpy.array([_numbers(row) for row in rows])


def map_picture(mean: numpy.ndarray) -> Figure:
    """Mean |R| [readers, sources] alone."""
    figure, (axes,) = panels(1)
    heatmap(figure, axes, mean, title="mean |R|", across="source", down="reader")
    return figure
