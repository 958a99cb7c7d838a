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


# What is printed has binary prefixes, memory and traffic alike; what is read may have either.
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
DECIMAL = {"kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS = {"": 1, "B": 1, **BINARY, **DECIMAL}


def parse_bytes(text: str) -> int | None:
    """Bytes of a text such as 4MiB, 4MB or 4194304; None when it is none."""
    found = re.fullmatch(rf"(\d+)\s*({'|'.join(_UNITS)})", text.strip(), re.ASCII)
    return int(found[1]) * _UNITS[found[2]] if found else None


def format_bytes(count: float) -> str:
    value, unit = float(count), "B"
    for larger in BINARY:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"


def format_rate(bytes_per_second: float) -> str:
    return f"{format_bytes(bytes_per_second)}/s"
