"""Which layers read which entries."""

from __future__ import annotations

import pytest

from lime_dist.depth.pattern import Pattern, none_pattern, parse_pattern, pattern_of_edges
from lime_dist.errors import PlanError

SOURCES = {
    "full": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]],
    "first:1": [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]],
    "first:2": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]],
    "last:1": [[0], [0, 1], [1, 2], [2, 3], [3, 4]],
    "last:2": [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]],
    "stride:2": [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 2, 3, 4]],
    "stride:3": [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]],
    "first:1+last:2": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 2, 3, 4]],
    "stride:3 + first:2": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]],
    "within_stage": [[0], [0, 1], [2], [2, 3], [2, 3, 4]],
    "within_stage+first:1": [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 2, 3, 4]],
    "block:2": [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4]],
    "block:2+first:1": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4]],
    "last:9": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]],
}


@pytest.mark.parametrize("text", SOURCES)
def test_sources_are_ascending_with_the_own_layer_last(text: str) -> None:
    pattern = parse_pattern(text, 5, stages=(range(0, 2), range(2, 5)))
    assert [list(read) for read in pattern.sources] == SOURCES[text]
    assert pattern.name == text and pattern.num_layers == 5


@pytest.mark.parametrize(
    "text",
    [
        "full:2",
        "first",
        "first:",
        "last:0",
        "stride:-1",
        "last:x",
        "last:1.5",
        "all",
        "",
        "+",
        "full+all",
        "block",
        "block:2+block:3",
        "block:2+within_stage",
    ],
)
def test_other_texts_are_refused_by_key(text: str) -> None:
    with pytest.raises(PlanError, match="^depth.pattern: "):
        parse_pattern(text, 4)


def test_routers_readers_and_entries() -> None:
    assert [parse_pattern("last:1", 3).has_router(layer) for layer in range(3)] == [False, True, True]
    assert [parse_pattern("last:1", 4).last_reader(layer) for layer in range(4)] == [1, 2, 3, 3]
    assert [parse_pattern("first:1", 4).last_reader(layer) for layer in range(4)] == [3, 2, 3, 3]
    apart = Pattern("apart", ((0,), (1,), (0, 2)))  # layer 1 neither reads nor is read
    assert [apart.is_entry(layer) for layer in range(3)] == [True, False, True]
    assert not any(none_pattern(3).has_router(layer) or none_pattern(3).is_entry(layer) for layer in range(3))


@pytest.mark.parametrize(
    ("text", "num_layers", "blocks"),
    [
        ("block:2", 5, [range(0, 2), range(2, 4)]),
        ("block:3+last:1", 9, [range(0, 3), range(3, 6)]),  # nobody reads the last one
        ("block:1", 5, []),
        ("full", 5, []),
    ],
)
def test_blocks(text: str, num_layers: int, blocks: list[range]) -> None:
    assert list(parse_pattern(text, num_layers).blocks) == blocks


def test_edges_may_be_given_one_by_one() -> None:
    assert pattern_of_edges({3: [2, 0], 1: []}, 4).sources == ((0,), (1,), (2,), (0, 2, 3))


@pytest.mark.parametrize("edges", [{4: [0]}, {-1: [0]}, {2: [2]}, {2: [3]}, {2: [-1]}])
def test_edges_that_no_layer_can_have_are_refused(edges: dict[int, list[int]]) -> None:
    with pytest.raises(PlanError, match="^depth.pattern: "):
        pattern_of_edges(edges, 4)
