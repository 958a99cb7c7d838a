"""The plan's picture: well-formed, with every layer, hop, raw entry, partial sum and kept entry in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lime_dist.config import Config, check_config, load_config
from lime_dist.plan.drawing import (
    BUS,
    COLUMN_WIDTH,
    GAP,
    LAYER_WIDTH,
    MARGIN,
    MAX_SINGLE_ROWS,
    RAW,
    ROW_HEIGHT,
    ROWS_TOP,
    draw_plan,
    plan_rows,
)
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.stages import plan_transfer_of

ROOT = Path(__file__).parents[2]
PATTERNS = ("full", "first:2", "last:3", "stride:2", "within_stage")


def make_config(*overrides: str) -> Config:
    return check_config(load_config(ROOT / "configs" / "quickstart.yaml", list(overrides)))


def texts(svg: str) -> Counter[str]:
    """How often each text, or its explanation on hovering, is in the picture."""
    root = ElementTree.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return Counter(part for element in root.iter() if element.tag.endswith("text") for part in element.itertext())


@pytest.mark.parametrize("policy", ("least", "relay"))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_everything_is_in_the_picture(pattern: str, policy: str) -> None:
    config = make_config("parallel.pp=4", f"depth.pattern={pattern}", f"depth.policy={policy}")
    hops, found = plan_transfer_of(config).hops, texts(draw_plan(plan_run(config)))
    assert all(found[f"layer {layer}"] == 1 for layer in range(8))
    assert all(found[f"stage {stage}"] == 1 for stage in range(4))
    assert all(found[f"boundary {boundary} > {boundary + 1}"] == 1 for boundary in range(3))
    for layer in range(8):
        assert found[f"raw {layer}"] == sum(layer in hop.raw_entries for hop in hops)
        assert found[f"sum {layer}"] == sum(layer in hop.partial_sums for hop in hops)
    assert not any("kept" in text or "chunk" in text for text in found)


@pytest.mark.parametrize("policy", ("least", "relay"))
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("pp", "virtual_stages"), ((2, 2), (2, 4), (4, 2)))
def test_everything_of_virtual_stages_is_in_the_picture(
    pp: int, virtual_stages: int, pattern: str, policy: str
) -> None:
    config = make_virtual(pp, virtual_stages, f"depth.pattern={pattern}", f"depth.policy={policy}")
    transfer, found = plan_transfer_of(config), texts(draw_plan(plan_run(config)))
    num_chunks = pp * virtual_stages
    assert all(found[f"layer {layer}"] == 1 for layer in range(16))
    assert all(found[f"stage {stage}"] == virtual_stages for stage in range(pp))
    assert all(f"chunk {chunk}: {layers_text(transfer.chunks[chunk])}" in found for chunk in range(num_chunks))
    assert all(found[f"hop {hop}: stage {hop % pp} > {(hop + 1) % pp}"] == 1 for hop in range(num_chunks - 1))
    kept = [transfer.chunk(chunk).kept for chunk in range(num_chunks)]
    for layer in range(16):
        assert found[f"raw {layer}"] == sum(layer in hop.raw_entries for hop in transfer.hops)
        assert found[f"sum {layer}"] == sum(layer in hop.partial_sums for hop in transfer.hops)
        assert found[f"kept {layer}"] == sum(layer in entries for one in kept for entries in one.values())
    for one in kept:
        for since, entries in one.items():
            assert all(f"entries of layers {layer}, here since chunk {since}" in found for layer in entries)
    assert any(text.startswith("kept: ") for text in found) == any(kept)


def layers_text(layers: range) -> str:
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start}–{layers[-1]}"


def make_virtual(pp: int, virtual_stages: int, *overrides: str) -> Config:
    layout = f"parallel.pp={pp}", f"parallel.virtual_stages={virtual_stages}"
    return make_config("model.num_layers=16", *layout, *overrides)


def test_the_chunks_of_a_stage_share_a_tint_of_their_own() -> None:
    panels = [panel.attrib["fill"] for panel in rectangles(draw_plan(plan_run(make_virtual(4, 2))), width=COLUMN_WIDTH)]
    assert panels[:4] == panels[4:] and len(set(panels)) == 4
    panels = [
        panel.attrib["fill"]
        for panel in rectangles(draw_plan(plan_run(make_config("parallel.pp=4"))), width=COLUMN_WIDTH)
    ]
    assert len(panels) == 4 and len(set(panels)) == 1


def rectangles(svg: str, *, width: int) -> list[ElementTree.Element]:
    return [each for each in elements(svg, "rect") if each.attrib["width"] == str(width)]


def elements(svg: str, kind: str) -> list[ElementTree.Element]:
    return [each for each in ElementTree.fromstring(svg).iter() if each.tag.endswith(f"}}{kind}")]


def raw_lines(svg: str, height: float) -> list[tuple[float, float, bool]]:
    """Ends of the lines of a row's raw entries, and whether they are dashed."""
    found = [
        (float(each.attrib["x1"]), float(each.attrib["x2"]), "stroke-dasharray" in each.attrib)
        for each in elements(svg, "line")
        if each.attrib["stroke"] == RAW and float(each.attrib["y1"]) == float(each.attrib["y2"]) == height
    ]
    return sorted(found)


def test_what_is_read_only_where_it_is_kept_is_not_drawn_as_sent() -> None:
    """Two stages of two chunks of two layers: 0 crosses and is kept for chunk 3, 1 is kept for chunk 2, 2 is not read."""
    svg = draw_plan(
        plan_run(make_config("parallel.pp=2", "parallel.virtual_stages=2", "depth.pattern={6: [0], 5: [1]}"))
    )
    found, heights = texts(svg), [ROWS_TOP + (layer + 0.5) * ROW_HEIGHT for layer in range(3)]
    assert (found["raw 0"], found["raw 1"], found["kept 0"], found["kept 1"]) == (1, 0, 2, 1)
    box_right, column = (COLUMN_WIDTH + LAYER_WIDTH) / 2, COLUMN_WIDTH + GAP
    box_left = (COLUMN_WIDTH - LAYER_WIDTH) / 2
    assert raw_lines(svg, heights[0]) == [
        (MARGIN + box_right, MARGIN + column + box_left, False),  # from its layer to where it is kept
        (MARGIN + 3 * column + BUS, MARGIN + 3 * column + box_left, True),
    ]
    assert raw_lines(svg, heights[1]) == [(MARGIN + 2 * column + BUS, MARGIN + 2 * column + box_left, True)]
    assert raw_lines(svg, heights[2]) == []


def test_kept_entries_share_rows() -> None:
    config = make_config("parallel.pp=4", "parallel.virtual_stages=4", "model.num_layers=32")
    found = texts(draw_plan(plan_run(config)))
    # Chunk c reads what its stage has kept of all chunks that came round before it, until sums take over.
    kept = [sum(map(len, plan_transfer_of(config).chunk(chunk).kept.values())) for chunk in range(16)]
    assert found["2 kept"] == sum(kept) // 2 > 0
    assert found["entries of layers 0-1, here since chunk 0"] == 3


@pytest.mark.parametrize("pattern", PATTERNS)
def test_many_layers_share_rows(pattern: str) -> None:
    config = make_config("parallel.pp=8", "model.num_layers=128", f"depth.pattern={pattern}")
    transfer = plan_transfer_of(config)
    rows = plan_rows(transfer)
    assert sorted(layer for row in rows for layer in row.layers) == list(range(128))
    assert len(rows) <= 8 * 8
    for row in rows:
        assert {transfer.chunk_of[layer] for layer in row.layers} == {row.chunk}
        assert {transfer.raw_until[layer] for layer in row.layers} == {row.raw_until}
        assert {transfer.sum_from[layer] for layer in row.layers} == {row.sum_from}
    found = texts(draw_plan(plan_run(config)))
    assert all(row.label in found for row in rows)


def test_a_row_each_up_to_the_limit() -> None:
    for num_layers, rows in ((MAX_SINGLE_ROWS, MAX_SINGLE_ROWS), (2 * MAX_SINGLE_ROWS, 4)):
        config = make_config("parallel.pp=4", f"model.num_layers={num_layers}")
        assert len(plan_rows(plan_transfer_of(config))) == rows


@pytest.mark.parametrize("overrides", (["parallel.pp=1"], ["parallel.pp=2", "depth.router=none"]))
def test_nothing_crosses(overrides: list[str]) -> None:
    found = texts(draw_plan(plan_run(make_config(*overrides))))
    assert not any(text.startswith(("raw ", "sum ", "partial")) and text.endswith("KiB") for text in found)


def test_the_shipped_picture_is_a_picture() -> None:
    found = texts((ROOT / "docs" / "plan.svg").read_text(encoding="utf-8"))
    assert all(found[f"layer {layer}"] == 1 for layer in range(8)) and found["sum 7"] and found["raw 0"]


def test_the_shipped_picture_of_virtual_stages_is_a_picture() -> None:
    found = texts((ROOT / "docs" / "virtual_stages.svg").read_text(encoding="utf-8"))
    assert found["hop 1: stage 1 > 0"] and found["kept 0"] == 2 and found["stage 0"] == found["stage 1"] == 2
