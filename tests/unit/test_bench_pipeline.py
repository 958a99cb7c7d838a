"""`lime-dist bench pipeline`: rates, planned bytes and the report, by hand; the growing tuple is the model; mistakes are refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lime_dist.bench.commands import add_parser
from lime_dist.bench.hosts import CardBytes
from lime_dist.bench.pipeline.comparison import Report
from lime_dist.bench.pipeline.growing_tuple import TupleStage
from lime_dist.bench.pipeline.measuring import Findings, Job, LossesDiffer, Step, check_losses
from lime_dist.bench.pipeline.on_hosts import make_records
from lime_dist.bench.pipeline.ways import Way, limited_rate, make_ways
from lime_dist.errors import ConfigError
from lime_dist.lime.model import model_loss, plain_model
from lime_dist.lime.parts import PlainParts
from lime_dist.lime.values import gather_logical, initialize

TINY = (
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.vocab_size=64",
    "data.seq_length=8",
    "pipeline.num_microbatches=4",
    "data.global_batch_size=4",
)
SUMMATION_ORDER = 1e-5  # fp32


def find_way(ways: list[Way], model: str, schedule: str = "1F1B") -> Way:
    return next(way for way in ways if (way.model, way.schedule) == (model, schedule))


def test_planned_bytes_of_each_card() -> None:
    ways = make_ways(TINY)
    residual = entry = 8 * 32 * 4  # 4 KV heads of 8, K and V: as many as the hidden size

    def both_ways(*crossing: int) -> list[int]:
        """Of 4 microbatches, from the number of entries and sums over each boundary."""
        boundaries = [0, *(residual + count * entry for count in crossing), 0]
        return [4 * (before + behind) for before, behind in zip(boundaries, boundaries[1:])]

    assert find_way(ways, "LLaMA").card_bytes == both_ways(0, 0, 0)
    assert find_way(ways, "relay").card_bytes == both_ways(2, 4, 6)
    assert find_way(ways, "torch").card_bytes == find_way(ways, "DeepSpeed").card_bytes == both_ways(2, 4, 6)
    assert find_way(ways, "least").card_bytes == both_ways(2, 4, 2)


def test_rates_let_the_busiest_card_take_a_share_of_the_step() -> None:
    ways = make_ways(TINY)
    busiest = 4 * (3 + 5) * 8 * 32 * 4
    assert limited_rate(ways, 2.0, 0.25) == busiest / 0.5
    assert limited_rate(ways, 2.0, 0.5) == busiest


def test_ways_have_their_own_configs_and_twins() -> None:
    ways = make_ways()
    assert len({(way.model, way.schedule) for way in ways}) == len(ways)
    assert all(any((twin.model, twin.schedule) == way.twin for twin in ways) for way in ways)
    assert all(way.config.parallel.virtual_stages == 2 for way in ways if way.schedule.startswith("v=2"))
    assert all(way.plan.warmup == (7 if "auto" in way.schedule else None) for way in ways)
    assert find_way(ways, "first:2").config.depth.pattern == "first:2"
    assert {way.model for way in make_ways(models=["torch"])} == {"LLaMA", "least", "torch"}


def test_the_growing_tuple_is_the_model() -> None:
    """Loss and gradients of four stages of it, one after the other, equal the single process's."""
    config = find_way(make_ways(TINY), "relay").config
    tokens = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(1))
    whole = plain_model(config.model, config.pattern)
    initialize(whole, seed=0)
    expected = model_loss(whole, tokens)
    expected.backward()
    stages = [TupleStage(config, index, PlainParts()) for index in range(4)]
    travelling: tuple[Tensor, ...] = (tokens[:, :-1],)
    for index, stage in enumerate(stages):
        initialize(stage.chunk, seed=0)
        outputs = stage(*travelling)
        travelling = outputs if index < 3 else (outputs,)
        assert len(travelling) == (1 + 2 * (index + 1) if index < 3 else 1)
    loss = stages[-1].loss(travelling[0], tokens[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=SUMMATION_ORDER, atol=0)
    gradients = gather_logical(whole, lambda parameter: parameter.grad)
    for stage in stages:
        for name, gradient in gather_logical(stage.chunk, lambda parameter: parameter.grad).items():
            torch.testing.assert_close(gradient, gradients[name], rtol=SUMMATION_ORDER, atol=1e-7, msg=name)


def test_other_losses_are_no_comparison() -> None:
    ways = [way for way in make_ways(TINY) if way.schedule == "1F1B"]
    same = [4.0 if way.model in ("LLaMA", "first:2") else 5.0 for way in ways]
    check_losses(ways, same)
    for loss in (5.002, float("nan")):
        with pytest.raises(LossesDiffer, match="first loss of DeepSpeed, 1F1B"):
            check_losses(ways, [*same[:-1], loss])


def made_findings(ways: list[Way], seconds: list[list[float]], host: int) -> Findings:
    """seconds: by round and way."""
    card = CardBytes(sent=1000 * (host + 1), received=1)
    steps = [
        Step(way=way, share=0, seconds=value - 0.001 * host, cpu_seconds=1.0, card=card)
        for values in seconds
        for way, value in enumerate(values)
    ]
    peaks = [100 * (host + 1)] * len(ways)
    return Findings(losses=[5.0] * len(ways), peak_bytes=peaks, llama_seconds=[2.0], rates=[None], steps=steps)


def test_ratios_are_of_the_same_round_and_bytes_of_the_busiest_card() -> None:
    ways = [find_way(make_ways(TINY), "LLaMA"), find_way(make_ways(TINY), "relay")]
    seconds = [[1.0, 2.0], [2.0, 3.0], [4.0, 4.0]]
    findings = [made_findings(ways, seconds, host) for host in range(4)]
    llama, relay = make_records(Job(ways=ways, shares=[None], rounds=3), findings)
    assert (llama.ratio, relay.ratio, relay.ratio_range) == (1.0, 1.5, (1.0, 2.0))
    assert relay.seconds == [2.0, 3.0, 4.0] and relay.cpu_seconds == 4.0 and relay.peak_bytes == 400
    assert relay.planned_bytes == max(ways[1].card_bytes) and relay.sent_bytes == 3000  # the third host's
    assert relay.received_bytes == 1 and relay.counted_over_planned == 1 / relay.planned_bytes
    report = Report(circumstances={}, records=[llama, relay])
    rows = report.to_markdown().splitlines()[:4]
    assert all(row.count("|") == 8 for row in rows) and "**1.50** (1.00 to 2.00), 3.00 s" in rows[3]
    assert json.loads(json.dumps(report.to_json()))["records"][1]["ratio"] == 1.5


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser("lime-dist")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["bench", "pipeline", *map(str, arguments)])
    return args.run(args)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("parallel.tp=2", "parallel: tp=2 pp=4 dp=1 does not fit hosts of one stage each"),
        ("parallel.pp=1", "set parallel.pp to 2 or more"),
        ("parallel.pp=9", "pipeline.partition|parallel.pp|model.num_layers"),
        ("model.hiden_size=3", "did you mean hidden_size|hiden_size"),
        ("--models leas", "--models: 'leas' is unknown; did you mean least"),
        ("--json {t}/no/x.json", "--json: the folder .*no does not exist"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(*arguments.format(t=tmp_path).split())
