"""The plan's picture: well-formed, with every layer, boundary, raw entry and partial sum in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lime_dist.config import Config, check_config, load_config
from lime_dist.plan.drawing import MAX_SINGLE_ROWS, draw_plan, plan_rows
from lime_dist.plan.stages import plan_run_transfer

ROOT = Path(__file__).parents[2]
PATTERNS = ("full", "first:2", "last:3", "stride:2", "within_stage")


def make_config(*overrides: str) -> Config:
    return check_config(load_config(ROOT / "configs" / "quickstart.yaml", ["parallel.tp=1", *overrides]))


def texts(svg: str) -> Counter[str]:
    """How often each text, or its explanation on hovering, is in the picture."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return Counter(part for element in root.iter() if element.tag.endswith("text") for part in element.itertext())


@pytest.mark.parametrize("policy", ("least", "relay"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_everything_is_in_the_picture(pattern: str, policy: str) -> None:
    config = make_config("parallel.pp=4", f"depth.pattern={pattern}", f"depth.policy={policy}")
    boundaries, found = plan_run_transfer(config).hops, texts(draw_plan(config))
    assert all(found[f"layer {layer}"] == 1 for layer in range(8))
    assert all(found[f"stage {stage}"] == 1 for stage in range(4))
    assert all(found[f"boundary {boundary} > {boundary + 1}"] == 1 for boundary in range(3))
    for layer in range(8):
        assert found[f"raw {layer}"] == sum(layer in boundary.raw_entries for boundary in boundaries)
        assert found[f"sum {layer}"] == sum(layer in boundary.partial_sums for boundary in boundaries)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_many_layers_share_rows(pattern: str) -> None:
    config = make_config("parallel.pp=8", "model.num_layers=128", f"depth.pattern={pattern}")
    transfer = plan_run_transfer(config)
    rows = plan_rows(transfer)
    assert sorted(layer for row in rows for layer in row.layers) == list(range(128))
    assert len(rows) <= 8 * 8
    for row in rows:
        assert {transfer.chunk_of[layer] for layer in row.layers} == {row.stage_index}
        assert {transfer.raw_until[layer] for layer in row.layers} == {row.raw_until}
        assert {transfer.sum_from[layer] for layer in row.layers} == {row.sum_from}
    found = texts(draw_plan(config))
    assert all(row.label in found for row in rows)


def test_a_row_each_up_to_the_limit() -> None:
    for num_layers, rows in ((MAX_SINGLE_ROWS, MAX_SINGLE_ROWS), (2 * MAX_SINGLE_ROWS, 4)):
        config = make_config("parallel.pp=4", f"model.num_layers={num_layers}")
        assert len(plan_rows(plan_run_transfer(config))) == rows


@pytest.mark.parametrize("overrides", (["parallel.pp=1"], ["parallel.pp=2", "depth.router=none"]))
def test_nothing_crosses(overrides: list[str]) -> None:
    found = texts(draw_plan(make_config(*overrides)))
    assert not any(text.startswith(("raw ", "sum ", "partial")) and text.endswith("KiB") for text in found)


def test_the_shipped_picture_is_a_picture() -> None:
    found = texts((ROOT / "docs" / "plan.svg").read_text(encoding="utf-8"))
    assert all(found[f"layer {layer}"] == 1 for layer in range(8)) and found["sum 7"] and found["raw 0"]
