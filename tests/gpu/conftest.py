"""Tests marked `gpu` run where there are GPUs enough. This process leaves CUDA alone: only ranks use it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def gpus(request: pytest.FixtureRequest) -> None:
    """Skips a test of a layout, `text`, that has more ranks than there are GPUs."""
    if request.node.get_closest_marker("gpu") is None:
        return
    found = torch.cuda.device_count()
    if not found:
        pytest.skip("no GPU here")
    wanted = num_ranks(request.getfixturevalue("text"))
    if found < wanted:
        pytest.skip(f"{wanted} GPUs are needed, {found} here")


def num_ranks(text: str) -> int:
    """Of a layout in words of `common.SHORT`."""
    count = 1
    for word in text.split():
        axis, _, size = word.partition("=")
        count *= int(size) if axis in ("tp", "pp", "dp") else 1
    return count
