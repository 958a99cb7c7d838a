"""What a sampled value says beside its token id, in bits above it: int64, so that samples keep their type and shape.

Samples cut from a stream of files without a loss mask have no mark: their values are ids. The functions take whole
numbers, and arrays of NumPy or torch, and give the same.
"""

from __future__ import annotations

from typing import Any

ID_BITS = 32
ID_MASK = (1 << ID_BITS) - 1
NOT_TARGET = 1 << ID_BITS  # no part of the loss: masked out, padding, or without a token before it in its document
BEGINS = 1 << (ID_BITS + 1)  # first token of a document


def token_ids(values: Any) -> Any:
    return values & ID_MASK


def is_target(values: Any) -> Any:
    """Booleans. Of a sample's first value it says nothing: that is an input only."""
    return (values & NOT_TARGET) == 0


def begins(values: Any) -> Any:
    return (values & BEGINS) != 0
