"""`lime-dist plan --predict`: words and units, which settings come first, what is marked, and the sweep against trying every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lime_dist.cli.command_line import main
from lime_dist.config import Config, check_config, parse_config
from lime_dist.errors import ConfigError
from lime_dist.plan.costs import Rates
from lime_dist.plan.machine import Machine, parse_latency, parse_rate, parse_speed, read_words
from lime_dist.plan.predict import (
    Comparison,
    Prediction,
    Setting,
    balanced_counts,
    compare_settings,
    predict,
    prediction_table,
)
from lime_dist.plan.schedule import Kind
from lime_dist.plan.sweep import sweep

RUN: dict[str, Any] = {
    "model": {
        "num_layers": 8, "hidden_size": 64, "intermediate_size": 192, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 256
    },
    "parallel": {"pp": 4},
    "pipeline": {"num_microbatches": 8},
    "data": {"seq_length": 128, "global_batch_size": 32},
    "run": {"device": "cpu", "steps": 1000},
}  # fmt: skip
SLOW = Machine(rate=1e9, links=(1e6, 1e6), latency=0.0)  # a residual takes 33 ms, a stage's layers some 30
QUICK = Machine(rate=1e9, links=(1e12, 1e12), latency=0.0)


def make_config(*overrides: str) -> Config:
    return check_config(parse_config(RUN, overrides))


def compare(machine: Machine, *overrides: str) -> Comparison:
    return compare_settings(make_config(*overrides), machine.rates())


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))
    return Path("run.yaml")


# ---- words


@pytest.mark.parametrize(
    ("text", "number"),
    [("50GB/s", 50e9), ("400Gb/s", 50e9), ("400 Gbit/s", 50e9), ("100Mbit/s", 12.5e6), ("2.5MB/s", 2.5e6), ("1TB/s", 1e12), ("46.5GiB/s", 46.5 * 2**30), ("5 MiB/s", 5 * 2**20)],
)  # fmt: skip
def test_speeds_of_links(text: str, number: float) -> None:
    assert parse_speed(text) == number


def test_rates_and_latencies() -> None:
    assert parse_rate("400TFLOP/s") == 4e14 and parse_rate("1.5PFLOP/s") == 1.5e15 and parse_rate("20GFLOP/s") == 2e10
    assert parse_latency("10us") == pytest.approx(1e-5) and parse_latency("0.5ms") == 5e-4
    for text in ("400", "400TFLOP", "-1TFLOP/s", "0TFLOP/s", "1e999TFLOP/s", "nanTFLOP/s"):
        assert parse_rate(text) is None
    for text in ("50", "50Gib/s", "50GB", "GB/s", "0GB/s"):
        assert parse_speed(text) is None


def test_words_are_the_machine_and_overrides() -> None:
    words = read_words(["links=400Gb/s,900GB/s", "rate=300TFLOP/s", "node=4", "latency=2us", "parallel.pp=2"])
    assert words.machine == Machine(rate=3e14, links=(50e9, 900e9), latency=pytest.approx(2e-6), node_size=4)
    assert words.overrides == ("parallel.pp=2",) and words.profile is None
    assert read_words(["rate=1TFLOP/s", "links=1GB/s"]).machine.links == (1e9, 1e9)
    assert read_words([]).machine == Machine()
    assert read_words(["runs/a"]).profile == Path("runs/a")


def test_what_is_given_stands_in_place_of_what_was_measured() -> None:
    measured = Machine(rate=1e9, links=(1.0, 2.0)).rates()
    words = read_words(["runs/a", "links=5GB/s"])
    rates = words.on(measured)
    assert rates.between_nodes.bytes_per_second == 5e9
    assert rates.seconds_per_flop == measured.seconds_per_flop
    assert read_words(["runs/a"]).on(measured) == measured


MISTAKES = [
    (["rate=400"], "rate=400 is no rate; write rate=400TFLOP/s"),
    (["links=50GB/s", "rate=fast"], "rate=fast is no rate; write rate=400TFLOP/s"),
    (["links=50GB/s,1GB/s,2GB/s"], "links=50GB/s,1GB/s,2GB/s is no speed of links; write links=50GB/s,900GB/s"),
    (["node=0"], "node=0 is no number of ranks; write node=8"),
    (["link=50GB/s"], "'link': unknown word; did you mean links?"),
    (["rate=400TFLOP/s"], "rate without links; add links=50GB/s,900GB/s"),
    (["links=50GB/s"], "links without rate; add rate=400TFLOP/s"),
    (["runs/a", "runs/b"], "'runs/b': a second profile; name one folder"),
]


def test_a_profile_that_is_not_there_is_told(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run_yaml), "--predict", "runs/a"]) == 2
    assert capsys.readouterr().err.startswith("lime-dist: runs/a: no profile there; make one with")


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_end_in_one_line(
    words: list[str], message: str, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(run_yaml), "--predict", *words]) == 2
    output = capsys.readouterr()
    assert (
        output.out == "" and output.err.startswith(f"lime-dist: --predict: {message}") and output.err.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "8"], "--sweep: is part of a prediction; add --predict"),
        (["--predict", "--sweep", "8"], "--sweep: needs what a rank may take of its device; set run.memory=70GiB"),
        (["--predict", "--sweep", "8", "run.memory=10KiB"], "run.memory: 10KiB, but a rank of the smallest layout of 8 ranks"),
        (["--predict", "--sweep", "7", "run.memory=1GiB", "model.num_layers=4"], "--sweep: no layout of 7 ranks suits"),
        (["--predict", "run.memory=much"], "run.memory: 'much' is no size; write 70GiB"),
        (["--predict", "--compare"], "--compare: is of the plan"),
        (["--predict", "parallel.pp=9"], "parallel.pp: 9 stages for model.num_layers=8"),
    ],
)  # fmt: skip
def test_other_mistakes(arguments: list[str], message: str, run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(run_yaml), *arguments]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith(f"lime-dist: {message}")
    )  # progress, where it takes seconds


# ---- settings


def test_today_is_first_and_others_by_their_step_time(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rate=1GFLOP/s", "links=1MB/s", "model.vocab_size=4096"]  # a head of several layers
    assert main(["plan", str(run_yaml), "--predict", *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["predict"]
    times = [one["step_seconds"] for one in report["settings"]]
    assert report["today"]["changes"] == {} and len(times) > 8
    assert times == sorted(times)
    for one in report["settings"]:
        assert one["against_today"] == pytest.approx(one["step_seconds"] / report["today"]["step_seconds"] - 1)
    changed = {key for one in report["settings"] for key in one["changes"]}
    assert changed >= {
        "depth.pattern", "depth.router", "depth.policy", "pipeline.num_microbatches", "pipeline.warmup",
        "parallel.virtual_stages", "pipeline.schedule", "pipeline.partition",
    }  # fmt: skip
    for one in report["settings"]:
        assert one["changes_model"] == any(key in ("depth.pattern", "depth.router") for key in one["changes"])


def test_the_table_says_what_changes_the_model_and_what_does_not_fit(
    run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(run_yaml), "--predict", "rate=1GFLOP/s", "links=1MB/s"]
    assert main([*words, "run.memory=6MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["setting", "step"] and lines[1].startswith("as it is")
    (llama,) = [line for line in lines if line.startswith("depth.router=none")]
    assert llama.endswith("+3.36 %, changes the model")
    assert any("over run.memory" in line for line in lines[1:])
    assert any(line.startswith("assumed: 1 GFLOP/s a device") for line in lines)
    assert any("last:j here reads j earlier" in line for line in lines)
    for line in lines[lines.index("") :]:
        assert len(line) <= 120


def test_a_slow_link_asks_for_a_warmup_and_a_quick_one_for_a_smaller_bubble() -> None:
    slow = compare(
        Machine(rate=2e9, links=(3e6, 3e6), latency=0.0), "depth.router=none", "pipeline.num_microbatches=32"
    )
    (warmup,) = [one for one in slow.singles if one.setting.changes == {"pipeline.warmup": "auto"}]
    assert warmup.against(slow.today) < -0.05
    assert warmup.simulated.exposed_seconds < slow.today.simulated.exposed_seconds
    quick = compare(QUICK, "depth.router=none")
    best = quick.best_of_the_same_model
    assert best is not None and best.simulated.bubble_share < quick.today.simulated.bubble_share / 2
    assert {"pipeline.num_microbatches", "parallel.virtual_stages"} & set(best.setting.changes)


def test_the_combination_is_of_changes_that_keep_the_model_and_beats_each_of_them() -> None:
    found = compare(QUICK)
    assert found.combination is not None
    assert found.combination.setting.keeps_model and len(found.combination.setting.changes) > 1
    kept = [one for one in found.singles if one.setting.keeps_model]
    assert found.combination.step_seconds < min(one.step_seconds for one in kept)
    assert str(found.combination.setting) in prediction_table(found, "")
    pasted = predict(make_config(), QUICK.rates(), Setting(changes=found.combination.setting.changes))
    assert pasted.step_seconds == found.combination.step_seconds


def test_what_does_not_fit_the_memory_is_not_advised() -> None:
    free = compare(QUICK, "depth.router=none", "pipeline.num_microbatches=16", "data.global_batch_size=16")
    best = free.best_of_the_same_model
    assert best is not None
    limit = max(best.memory_bytes, free.today.memory_bytes) - 1
    bound = compare(
        QUICK, "depth.router=none", "pipeline.num_microbatches=16", "data.global_batch_size=16", f"run.memory={limit}"
    )
    other = bound.best_of_the_same_model
    assert other is None or other.memory_bytes <= limit
    assert any(not one.fits for one in bound.singles)


def test_a_setting_that_does_not_fit_asks_for_one_that_does() -> None:
    needed = compare(QUICK, "pipeline.num_microbatches=2").today.memory_bytes
    found = compare(QUICK, "pipeline.num_microbatches=2", f"run.memory={needed - 1}")
    best = found.best_of_the_same_model
    assert not found.today.fits and best is not None and best.fits
    lines = prediction_table(found, "").splitlines()
    assert any(line.startswith("today's setting is over run.memory; try first: ") for line in lines)
    nothing = compare(QUICK, "run.memory=4KiB")
    assert "nothing here fits run.memory" in prediction_table(nothing, "")


def test_a_pattern_that_stages_choose_is_another_on_other_stages() -> None:
    chosen = make_config().with_pattern(make_config("depth.pattern=within_stage").pattern.edges, "within_stage")
    settings = [one.setting for one in compare_settings(chosen, QUICK.rates()).singles]
    (virtual,) = [one for one in settings if one.changes.get("parallel.virtual_stages") == "2"]
    (microbatches,) = [one for one in settings if one.changes.get("pipeline.num_microbatches") == "16"]
    assert not virtual.keeps_model and microbatches.keeps_model


def test_partitions_are_balanced_by_what_stages_take() -> None:
    """A head as large as two layers takes two layers from its stage."""
    layer = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192) + 4 * 128 * 64
    config = make_config("model.num_layers=14", f"model.vocab_size={layer // 64}", "depth.router=none")
    assert balanced_counts(config, QUICK.rates()) == [4, 4, 4, 2]
    even = make_config("depth.router=none", "model.vocab_size=2")
    assert balanced_counts(even, QUICK.rates()) == [2, 2, 2, 2]


# ---- the sweep

CHANGED = ("tp", "pp", "dp")


def brute_force(config: Config, rates: Rates, num_ranks: int) -> list[float]:
    """Step times of all layouts that fit, tried one by one."""
    times = []
    for tp in (1, 2, 4):
        for pp in (1, 2, 4, 8):
            if num_ranks % (tp * pp):
                continue
            dp = num_ranks // (tp * pp)
            for virtual_stages in (1, 2, 4):
                for number in (1, 2, 4, 8, 16, 32):
                    found = _try(config, rates, (tp, pp, dp), virtual_stages, number)
                    times += [found.step_seconds] if found is not None and found.fits else []
    return sorted(times)


def _try(
    config: Config, rates: Rates, sizes: tuple[int, int, int], virtual_stages: int, number: int
) -> Prediction | None:
    warmup = "auto" if sizes[1] > 1 and virtual_stages == 1 else "null"
    changes = {
        **{f"parallel.{name}": str(size) for name, size in zip(CHANGED, sizes)},
        "parallel.virtual_stages": str(virtual_stages),
        "pipeline.num_microbatches": str(number),
        "pipeline.warmup": warmup,
        "parallel.sequence_parallel": str(sizes[0] > 1).lower(),
    }
    try:
        return predict(config, rates, Setting(changes=changes))
    except ConfigError:
        return None


@pytest.mark.parametrize("machine", (SLOW, QUICK))
@pytest.mark.parametrize("memory", ("4MiB", "1GiB"))
def test_the_sweep_finds_the_fastest_that_fit(machine: Machine, memory: str) -> None:
    config, rates = make_config(f"run.memory={memory}"), machine.rates()
    found = sweep(config, rates, 8)
    times, tried = [one.step_seconds for one in found.best], brute_force(config, rates, 8)
    assert times == pytest.approx(tried[:10])
    limit = config.run.memory_bytes
    assert limit is not None
    for one in found.best:
        parallel = one.plan.config.parallel
        assert one.memory_bytes <= limit
        assert parallel.tp * parallel.pp * (parallel.dp or 0) == 8
        assert 4 % parallel.tp == 0 and 32 % ((parallel.dp or 0) * one.plan.num_microbatches) == 0
        assert one.plan.config.tokens_per_step == config.tokens_per_step
        assert set(one.plan.transfer.pattern.edges) == set(config.pattern.edges)
    assert found.num_simulated < found.num_layouts


def test_microbatches_are_said_as_the_config_says_them() -> None:
    """By their size, where that is set: the same times, for the same settings."""
    by_number = make_config("run.memory=1GiB")
    size = by_number.microbatch_size
    by_size = make_config("run.memory=1GiB", "pipeline.num_microbatches=null", f"data.micro_batch_size={size}")
    assert by_size.num_microbatches == by_number.num_microbatches
    both = make_config("run.memory=1GiB", f"data.micro_batch_size={size}")
    found = [sweep(config, QUICK.rates(), 8).best for config in (by_number, by_size, both)]
    times = [[one.step_seconds for one in best] for best in found]
    assert times[0] == times[1] == times[2]
    assert all("pipeline.num_microbatches" not in one.setting.changes for one in found[1])
    assert all("data.micro_batch_size" in one.setting.changes for one in (*found[1], *found[2]))
    assert {one.setting.changes["pipeline.num_microbatches"] for one in found[2]} == {"null"}
    singles = compare_settings(by_size, QUICK.rates()).singles
    assert any(one.setting.changes.get("data.micro_batch_size") == str(size // 2) for one in singles)


def test_the_sweep_as_it_is_printed(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        str(run_yaml),
        "--predict",
        "run.memory=1GiB",
        "rate=1GFLOP/s",
        "links=1MB/s,1GB/s",
        "--sweep",
        "8",
    ]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "tokens/s", "of", "the", "rate", "bubble", "exposed", "memory/rank", "setting"]
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["predict"]["sweep"]
    best = report["best"][0]
    assert report["ranks"] == 8 and best["tokens_per_second"] == pytest.approx(32 * 128 / best["step_seconds"])
    assert 0 < best["share_of_rate"] < 1
    assert [one["step_seconds"] for one in report["best"]] == sorted(one["step_seconds"] for one in report["best"])


def test_the_rate_is_reached_where_nothing_else_takes_time() -> None:
    config = make_config("run.memory=1GiB", "depth.router=none")
    rates = QUICK.rates()
    best = sweep(config, rates, 1).best[0]
    flops = best.plan.model_flops_per_token * config.tokens_per_step
    assert best.step_seconds == pytest.approx(flops * rates.seconds_per_flop[Kind.FORWARD])
