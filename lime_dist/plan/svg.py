"""Shapes of an SVG document, each as its text. Lengths are in pixels. Knows nothing of plans."""

from __future__ import annotations

from html import escape

INK = "#1f2937"


def text(
    x: float,
    y: float,
    content: str,
    *,
    size: int,
    fill: str = INK,
    weight: int = 400,
    anchor: str = "start",
    hover: str | None = None,
) -> str:
    title = f"<title>{escape(hover)}</title>" if hover else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}">'
        f"{title}{escape(content)}</text>"
    )


def rect(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none", radius: int = 0) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" fill="{fill}" stroke="{stroke}"/>'


def outline(x: float, y: float, width: float, height: float, colour: str, *, radius: int = 0) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"' + (f' rx="{radius}"' if radius else "")
    return f'<rect {place} fill="none" stroke="{colour}" stroke-dasharray="3 3"/>'


def dashes(x1: float, x2: float, y: float, colour: str) -> str:
    return f'<line x1="{x1:g}" y1="{y:g}" x2="{x2:g}" y2="{y:g}" stroke="{colour}" stroke-dasharray="3 3"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 2) -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"/>'


def arrow(x1: float, x2: float, y: float, colour: str, width: float = 2) -> str:
    head = 2 + 2 * width
    tip = f"{x2:g},{y:g} {x2 - head:g},{y - head / 2:g} {x2 - head:g},{y + head / 2:g}"
    return f'{line(x1, y, x2 - head, y, colour, width)}<polygon points="{tip}" fill="{colour}"/>'


def circle(x: float, y: float, radius: float, colour: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{colour}"/>'
