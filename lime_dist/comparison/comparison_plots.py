"""The curves of a comparison as SVG, and the page that has the tables and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from lime_dist.comparison.comparing import Comparison
from lime_dist.comparison.comparison_report import (
    Section,
    differences,
    how_it_was_read,
    loss_section,
    savings,
    size_section,
)
from lime_dist.comparison.curves import Curve
from lime_dist.formats import format_si
from lime_dist.pictures import heading, panels, paragraph, table, to_page, to_svg

MAX_POINTS = 400  # of a line
AXES = {"steps": "steps", "tokens": "tokens", "flops": "model FLOPs"}
_HIDDEN_SHARE = (
    0.05  # of the longest curve: losses before it may lie above the panel, where they would flatten all others
)


@dataclass(frozen=True, kw_only=True)
class Band:
    """The mean over seeds, and the lowest and the highest seed, where all seeds have losses."""

    at: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def band_of(curves: Sequence[Curve], axis: str) -> Band:
    """axis: of AXES. Straight between losses."""
    places = [np.array(getattr(curve, axis), dtype=float) for curve in curves]
    start, end = max(at[0] for at in places), min(at[-1] for at in places)
    own = np.unique(np.concatenate(places))
    own = own[(own >= start) & (own <= end)]
    at = own if len(own) <= MAX_POINTS else np.linspace(start, end, MAX_POINTS)
    losses = np.stack([np.interp(at, place, curve.losses) for place, curve in zip(places, curves)])
    return Band(at=at, mean=losses.mean(axis=0), low=losses.min(axis=0), high=losses.max(axis=0))


def comparison_svg(comparison: Comparison) -> str:
    """Loss over steps, tokens and model FLOPs."""
    figure, axes = panels(len(AXES))
    for panel, axis in zip(axes, AXES):
        bands = {
            variant.name: band_of(list(curves.values()), axis)
            for variant, curves in zip(comparison.variants, comparison.curves)
        }
        _draw(panel, bands)
        panel.set_xlabel(AXES[axis])
    axes[0].set_ylabel("held-out loss" if comparison.metric == "eval_loss" else "train loss")
    axes[0].legend()
    return to_svg(figure)


def _draw(panel: Axes, bands: Mapping[str, Band]) -> None:
    for name, band in bands.items():
        (line,) = panel.plot(band.at, band.mean, label=name, linewidth=1.2)
        panel.fill_between(band.at, band.low, band.high, color=line.get_color(), alpha=0.2, linewidth=0)
    _fit(panel, list(bands.values()))
    panel.xaxis.set_major_formatter(lambda value, _: format_si(value))


def _fit(panel: Axes, bands: Sequence[Band]) -> None:
    start = _HIDDEN_SHARE * max(band.at[-1] for band in bands)
    shown = np.concatenate([losses[band.at >= start] for band in bands for losses in (band.low, band.high)])
    margin = 0.05 * (shown.max() - shown.min()) or 0.1
    panel.set_ylim(shown.min() - margin, shown.max() + margin)


def comparison_page(comparison: Comparison) -> str:
    """HTML that asks no other file for anything."""
    parts = [
        paragraph(how_it_was_read(comparison)),
        *(paragraph(f"Unfair: {warning}.") for warning in comparison.warnings),
        _markup(size_section(comparison)),
        heading("Final loss, and loss at equal FLOPs"),
        _markup(loss_section(comparison)),
        *map(paragraph, savings(comparison)),
        heading("Loss over steps, tokens and model FLOPs"),
        comparison_svg(comparison),
        paragraph("Lines are means over seeds, bands reach from the lowest seed to the highest."),
        *map(paragraph, differences(comparison)),
    ]
    return to_page("Runs compared", parts)


def _markup(section: Section) -> str:
    return table(section.head, section.rows)
