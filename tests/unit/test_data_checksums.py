"""Which bytes the checksums cover, and that they take a bounded number of reads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lime_dist.data import checksums
from lime_dist.data.checksums import BLOCK_BYTES, NUM_BLOCKS, block_digest, block_starts

LIMIT = NUM_BLOCKS * BLOCK_BYTES


@pytest.mark.parametrize("num_bytes", [0, 1, BLOCK_BYTES, BLOCK_BYTES + 1, LIMIT - 1, LIMIT])
def test_a_small_file_is_covered_wholly(num_bytes: int) -> None:
    starts = block_starts(num_bytes)
    assert starts == list(range(0, num_bytes, BLOCK_BYTES)) and len(starts) <= NUM_BLOCKS


@pytest.mark.parametrize("num_bytes", [LIMIT + 1, 10 * LIMIT + 7, 1 << 45])
def test_of_a_large_file_both_ends_and_as_many_blocks_as_ever(num_bytes: int) -> None:
    starts = block_starts(num_bytes)
    assert len(set(starts)) == NUM_BLOCKS and starts[0] == 0 and starts[-1] == num_bytes - BLOCK_BYTES
    gaps = [after - before for before, after in zip(starts, starts[1:])]
    assert max(gaps) - min(gaps) <= 1


def test_the_digest_is_of_the_size_and_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 2)
    monkeypatch.setattr(checksums, "NUM_BLOCKS", 3)
    (tmp_path / "a").write_bytes(b"ab--cd--ef")
    assert block_digest(tmp_path / "a") == hashlib.sha256(b"10" + b"abcdef").hexdigest()
    (tmp_path / "a").write_bytes(b"abcdef")
    assert block_digest(tmp_path / "a") == hashlib.sha256(b"6" + b"abcdef").hexdigest()
