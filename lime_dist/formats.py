"""Numbers as people read and write them."""

from __future__ import annotations

import re

RECENT_STEPS = 20  # the time left is judged by these


def format_si(value: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if round(value) < 1000:
            return f"{value:.0f}{unit}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}E"


def format_clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def parse_bytes(text: str) -> int | None:
    """Bytes of a text such as 4MiB or 4194304; None when it is none."""
    found = re.fullmatch(r"(\d+)\s*(KiB|MiB|GiB|)", text.strip(), re.ASCII)
    return int(found[1]) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "": 1}[found[2]] if found else None


def format_bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def format_rate(bytes_per_second: float) -> str:
    """In decimal units, as links are sold."""
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= size:
            return f"{bytes_per_second / size:.1f} {unit}"
    return f"{bytes_per_second / 1e3:.1f} kB/s"
