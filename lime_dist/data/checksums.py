"""Checksums that take a moment however large the file is: of blocks at places that depend on its size alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK_BYTES = 1 << 20
NUM_BLOCKS = 64
RULE = "sha256_of_64_blocks_of_1_MiB"  # what the meta file calls them; another rule needs another name


def block_digest(path: Path) -> str:
    """SHA-256 of the size and the sampled blocks of `path`; of all of it up to `NUM_BLOCKS` blocks. Raises: OSError."""
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode())
    with path.open("rb") as stream:
        for start in block_starts(num_bytes):
            stream.seek(start)
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def block_starts(num_bytes: int) -> list[int]:
    """All blocks of a small file; of a larger one the first, the last and evenly spaced ones between them."""
    if num_bytes <= NUM_BLOCKS * BLOCK_BYTES:
        return list(range(0, num_bytes, BLOCK_BYTES))
    last = num_bytes - BLOCK_BYTES
    return [last * index // (NUM_BLOCKS - 1) for index in range(NUM_BLOCKS)]


def file_digest(path: Path) -> str:
    """SHA-256 of a small file, such as a tokenizer, as `sha256sum` prints it. Raises: OSError."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
