"""Rank <-> (pp, dp, tp)."""

from __future__ import annotations

import pytest

from lime_dist.errors import LayoutError
from lime_dist.layout import Coordinate, Layout

LAYOUTS = [Layout(tp=tp, pp=pp, dp=dp) for tp in (1, 2, 4) for pp in (1, 2, 3) for dp in (1, 2, 3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_rank_has_a_place_of_its_own(layout: Layout) -> None:
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.tp * layout.pp * layout.dp
    assert [layout.global_rank(place) for place in places] == list(range(layout.world_size))


def test_tensor_ranks_are_neighbours_then_replicas_then_stages() -> None:
    layout = Layout(tp=2, pp=2, dp=3)
    places = [(p.pp_rank, p.dp_rank, p.tp_rank) for p in map(layout.coordinate, range(layout.world_size))]
    assert places == sorted(places)
    assert layout.global_rank(Coordinate(pp_rank=1, dp_rank=0, tp_rank=1)) == 7


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_is_refused(rank: int) -> None:
    with pytest.raises(LayoutError, match=f"rank {rank} is outside tp=2 pp=2 dp=1: start 4 ranks"):
        Layout(tp=2, pp=2).coordinate(rank)
