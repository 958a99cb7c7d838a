"""Plots as SVG and PNG, and a page that holds them: one file that asks no other for anything. No display is needed.

matplotlib takes a second to import; what draws imports this module when it draws.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "lime-dist",  # so that a picture drawn again is the same file
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # names of runs and files may have dollar signs
}
matplotlib.rcParams.update(_STYLE)

PANEL_INCHES = 4.2, 3.0
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
svg {{ max-width: 100%; height: auto }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def panels(count: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, at most `columns` side by side."""
    columns = min(count, columns)
    rows = (count + columns - 1) // columns
    figure = Figure(figsize=(columns * PANEL_INCHES[0], rows * PANEL_INCHES[1]), layout="constrained")
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, axes


def heatmap(figure: Figure, axes: Axes, values: Any, *, title: str, across: str, down: str) -> None:
    """[rows, columns], the first row on top, with its scale; nan stays blank."""
    axes.grid(False)
    axes.set(title=title, xlabel=across, ylabel=down)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(axes.imshow(values, cmap="viridis", vmin=0.0, interpolation="nearest", aspect="auto"), ax=axes)


def to_svg(figure: Figure) -> str:
    """The `<svg>` element, the same for the same picture."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def to_page(title: str, parts: Iterable[str]) -> str:
    """An HTML page of parts that are markup already: of `to_svg`, `table` and `paragraph`."""
    return _PAGE.format(title=escape(title), body="\n".join(parts))


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(cells, "td") for cells in rows) + "</table>"
