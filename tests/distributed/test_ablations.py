"""The ablations of routers under any layout: what they change is the model, and no layout changes that."""

from __future__ import annotations

from pathlib import Path

import pytest
from common import assert_equals_the_single_process, make_config

from lime_dist.checkpoint.edges import check_same_model
from lime_dist.errors import CheckpointError

LAYOUTS = ("tp=2 pp=3 sp split=[1,1,2] micro=3", "pp=3 layers=6 micro=2 dp=2 relay", "pp=2 v=2 micro=4 recompute")
ABLATIONS = (
    "depth.heads=same",
    "depth.heads=same depth.router_init=uniform",
    "depth.router_init=identity_zero",
    "depth.router=average",
    "depth.router=average depth.pattern=first:1",
    "depth.entry=hidden depth.router=average",
    "depth.entry=hidden depth.head_top_p=0.7",
    "depth.entry=hidden depth.router=dynamic depth.head_top_p=0.7",
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_layout_equals_the_single_process(ablation: str, layout: str) -> None:
    assert_equals_the_single_process(make_config(layout, *ablation.split()))


def test_heads_that_read_others_are_another_model() -> None:
    saved, config = make_config(""), make_config("", "depth.heads=same")
    with pytest.raises(CheckpointError, match="saved with depth.heads=all, the run has same; set depth.heads=all"):
        check_same_model(Path("step_000001"), saved, config)
