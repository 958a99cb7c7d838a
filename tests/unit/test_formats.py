"""Bytes as they are printed, in one system, and as they are read, in either."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lime_dist
from lime_dist.formats import format_bytes, format_rate, parse_bytes


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (50 * 10**6, "47.7 MiB"),
        (80 * 2**30, "80 GiB"),
        (3 * 2**50, "3072 TiB"),
    ],
)
def test_bytes_are_binary(count: int, said: str) -> None:
    assert format_bytes(count) == said
    assert format_rate(count) == f"{said}/s"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4194304", 2**22),
        ("12B", 12),
        ("256KiB", 2**18),
        ("256 kB", 256_000),
        ("256KB", 256_000),
        ("4MiB", 2**22),
        ("4MB", 4_000_000),
        ("70GiB", 70 * 2**30),
        ("80GB", 80 * 10**9),
        ("1TiB", 2**40),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_read_in_either_system(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "KiB", "1.5GiB", "-1", "4mib", "4Mb", "4 M", "1PB"])
def test_what_is_no_size(text: str) -> None:
    assert parse_bytes(text) is None


def test_no_output_has_a_unit_of_its_own() -> None:
    """Decimal bytes stand in what is read, in examples of it, and in the names of devices."""
    printed = re.compile(r"\}\s?[kKMGT]?B(/s)?\b|\}\s?[KMGT]iB")
    root = Path(lime_dist.__file__).parent
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if printed.search(line)
    }
    assert {line for line in found if not line.startswith(ALLOWED)} == set()


ALLOWED = (
    "bench/depth.py:",  # tables whose heads say MiB
    "checkpoint/safe_files.py:",  # a limit that is a whole number of MiB
)
