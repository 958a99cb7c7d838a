"""Every pattern under every policy, split, tp, dp, kind of entry and virtual stages: the whole product, a thousand runs.

Not part of a plain test run, where `test_layouts` crosses the same axes in a tenth of the time:
    bash tests/run.sh product --timeout 300
"""

from __future__ import annotations

import itertools

import pytest
from common import assert_equals_the_single_process, make_config

pytestmark = pytest.mark.product

PATTERNS = (
    "full", "first:2", "last:2", "first:1+last:1", "stride:3", "block:2", "within_stage+first:1",
    "{1:[0],4:[0,2],6:[1,3,5],7:[0]}",
)  # fmt: skip
SPLITS = ("[4,4]", "[2,6]", "[2,4,2]", "[1,4,3]", "[2,2,2,2]", "[1,3,3,1]")
ENTRIES = (
    "",
    "relay",
    "hidden",
    "hidden dynamic",
)  # the sums of hidden entries cannot be begun early: relay is all there is


def is_block_end_inside_a_stage(pattern: str, split: str) -> bool:
    """A block's sum is an entry of one stage, so blocks of two need stages of even length."""
    return pattern == "block:2" and any(int(size) % 2 for size in split.strip("[]").split(","))


CASES = [
    f"pp={split.count(',') + 1} layers=8 split={split} pattern={pattern} tp={tp} dp={dp} micro=2 {entry}".strip()
    for split, pattern, tp, dp, entry in itertools.product(SPLITS, PATTERNS, (1, 2), (1, 2), ENTRIES)
    if not is_block_end_inside_a_stage(pattern, split)
]
# pp x virtual stages: the layers of each chunk
VIRTUAL = {
    (2, 2): "[2,2,2,2]",
    (2, 3): "[2,1,1,1,1,2]",
    (2, 4): "[1,1,1,1,1,1,1,1]",
    (3, 2): "[1,2,1,1,2,1]",
    (4, 2): "[1,1,1,1,1,1,1,1]",
}
CASES += [
    f"pp={pp} v={v} layers=8 split={split} pattern={pattern} tp={tp} micro=4 {entry}".strip()
    for ((pp, v), split), pattern, tp, entry in itertools.product(VIRTUAL.items(), PATTERNS, (1, 2), ENTRIES)
    if not is_block_end_inside_a_stage(pattern, split)
]


@pytest.mark.parametrize("text", CASES)
def test_layout_equals_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_config(text))
