"""`lime-dist bench depth`: the yardstick computes what the model computes, and the memory it reports is exact."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lime_dist.bench.commands import add_parser
from lime_dist.bench.depth import (
    CAT,
    LLAMA,
    OURS,
    LiveBytes,
    Sizes,
    compare,
    measure,
    measure_memory,
    read_ways,
    step_ways,
)
from lime_dist.bench.reference import GrowingCat
from lime_dist.depth.pattern import parse_pattern
from lime_dist.errors import ConfigError
from lime_dist.lime.model import LimeChunk, plain_model
from lime_dist.lime.values import initialize

TINY = Sizes(num_layers=4, hidden_size=64, num_tokens=6)
CPU = torch.device("cpu")
SUMMATION_ORDER = 1e-5  # fp32, sums of a few hundred terms in another order


def loss_and_gradients(model: LimeChunk, memory: object) -> dict[str, Tensor]:
    inputs, targets = torch.arange(12).view(2, 6), torch.arange(1, 13).view(2, 6)
    loss, _ = model(inputs, 2, 6, memory, targets)
    names, parameters = zip(*model.named_parameters())
    return {"loss": loss.detach(), **dict(zip(names, torch.autograd.grad(loss, parameters)))}


@pytest.mark.parametrize("kv_heads", [8, 32])
def test_growing_cat_gives_the_same_loss_and_gradients(kv_heads: int) -> None:
    config = TINY.model(kv_heads)
    model = plain_model(config, parse_pattern("full", config.num_layers))
    initialize(model, seed=1)
    ours = loss_and_gradients(model, model.new_memory(12))
    cat = loss_and_gradients(model, GrowingCat(12, config.head_dim, dtype=torch.float32, device=CPU))
    assert ours.keys() == cat.keys() and any("lime_router" in name for name in cat)
    for name in ours:
        torch.testing.assert_close(ours[name], cat[name], rtol=SUMMATION_ORDER, atol=SUMMATION_ORDER, msg=name)


@pytest.mark.parametrize("kv_heads", [8, 32])
def test_entries_held_for_the_backward_pass(kv_heads: int) -> None:
    layers, head_dim = TINY.num_layers, TINY.hidden_size // 32
    entry_bytes = kv_heads * 2 * TINY.num_tokens * head_dim * 4
    ways = read_ways(TINY, kv_heads, torch.float32, CPU)
    held = {way: measure_memory(forward, CPU).held_bytes for way, forward in ways.items()}
    gaps = kv_heads * 64  # a cache line behind each head's row
    assert held == {OURS: layers * (entry_bytes + gaps), CAT: (layers * (layers + 1) // 2 - 1) * entry_bytes}


def test_live_bytes_count_new_storages_once_until_they_die() -> None:
    before = torch.ones(100)
    with LiveBytes() as memory:
        view = before[:50].t()
        new = before * 2
        same = new.view(10, 10)
        assert memory.live == 400
        del new
        before + before
        assert (memory.live, memory.peak) == (400, 800)
        del same, view
    assert memory.live == 0


def test_ways_take_turns() -> None:
    order: list[str] = []
    weight = torch.ones(1, requires_grad=True)

    def way(name: str):
        return lambda: (order.append(name), ([weight * 2], [None]))[1]

    costs = measure({"a": way("a"), "b": way("b")}, 3, CPU, "", lambda _: None)
    assert order[-6:] == ["a", "b"] * 3 and [len(cost.seconds) for cost in costs.values()] == [3, 3]


def test_step_compares_all_three_ways() -> None:
    costs = measure(step_ways(TINY, 8, torch.float32, CPU), 1, CPU, "", lambda _: None)
    pairs = [(comparison.way, comparison.against) for comparison in compare("whole step", 8, costs)]
    assert pairs == [(OURS, CAT), (OURS, LLAMA), (CAT, LLAMA)]


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser("lime-dist")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["bench", "depth", *map(str, arguments)])
    return args.run(args)


def test_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "depth.json"
    sizes = "--layers 3 --hidden-size 64 --tokens 64 --repeats 2 --device cpu"
    assert run(*sizes.split(), "--json", path) == 0
    printed = capsys.readouterr()
    rows = printed.out.splitlines()[:10]
    assert all(row.count("|") == 7 for row in rows) and "round 2 of 2" in printed.err
    report = json.loads(path.read_text())
    assert report["sizes"]["num_layers"] == 3 and len(report["comparisons"]) == 8
    assert report["comparisons"][0]["held_mib"][0] < report["comparisons"][0]["held_mib"][1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--layers 1", "--layers: 1 leaves no earlier layer"),
        ("--hidden-size 100", "--hidden-size: 100 is not a multiple of 64"),
        ("--json {t}/no/x.json", "--json: the folder .*no does not exist"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(*arguments.format(t=tmp_path).split())
