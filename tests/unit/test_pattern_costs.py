"""`plan --compare`: what each pattern costs equals the plan of its own run, and LLaMA's row is LLaMA's plan."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_stand_ins import write_checkpoint

from lime_dist.cli.command_line import main
from lime_dist.config import Config, check_config, load_config
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.pattern_costs import COMPARED_PATTERNS, compare_table, compared_configs, pattern_cost
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.table import MAX_WIDTH, POLICIES, plan_report
from lime_dist.plan.tensors import Role

RUN: dict[str, Any] = {
    "model": {"num_layers": 8, "hidden_size": 16, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 96},
    "parallel": {"pp": 4},
    "pipeline": {"num_microbatches": 4},
    "data": {"global_batch_size": 4, "seq_length": 8},
    "optim": {"warmup_steps": 0},
    "run": {"device": "cpu", "steps": 9},
}  # fmt: skip
TRAINED = "trained/step_000007"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))


def make(*overrides: str) -> Config:
    return check_config(load_config("run.yaml", overrides))


def costs_of(config: Config, *patterns: str) -> list[dict[str, Any]]:
    return [pattern_cost(one) for one in compared_configs(plan_run(config), patterns)]


def named(costs: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    return [(cost["pattern"], cost["policy"]) for cost in costs]


def by_name(costs: list[dict[str, Any]]) -> dict[tuple[str, str | None], dict[str, Any]]:
    return dict(zip(named(costs), costs, strict=True))


def test_the_usual_patterns_under_both_policies_after_llama() -> None:
    costs = costs_of(make("depth.pattern=last:3"))
    usual = [(pattern, policy) for pattern in (*COMPARED_PATTERNS, "block:2", "last:3") for policy in POLICIES]
    assert named(costs) == [("none", None), *usual]
    lines = compare_table(costs).splitlines()
    assert [tuple(line.split()[:2]) for line in lines[2:]] == [("LLaMA", "-"), *usual]


@pytest.mark.parametrize("partition", ("[1,2,2,3]", "[1,1,3,3]"))
def test_blocks_that_stages_would_cut_are_not_among_the_usual(partition: str) -> None:
    names = [name for name, _ in named(costs_of(make(f"pipeline.partition={partition}")))]
    assert not [name for name in names if name.startswith("block")]
    assert "block:4" in [name for name, _ in named(costs_of(make("parallel.pp=2")))]
    assert "block:1" not in [name for name, _ in named(costs_of(make("parallel.pp=4", "model.num_layers=4")))]


@pytest.mark.parametrize("entry", ("kv", "hidden"))
@pytest.mark.parametrize("virtual_stages", (1, 2))
@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_agrees_with_the_plan_of_its_run(policy: str, virtual_stages: int, entry: str) -> None:
    shared = f"parallel.virtual_stages={virtual_stages}", f"depth.entry={entry}"
    rows = by_name(costs_of(make(*shared), "stride:2", "first:1"))
    llama = make(*shared[:1], "depth.router=none")
    for cost, config in (
        (rows["stride:2", policy], make(*shared, "depth.pattern=stride:2", f"depth.policy={policy}")),
        (rows["none", None], llama),
    ):
        plan = plan_run(config)
        report = plan_report(plan)
        bundles = [hop["bundle_bytes"] for hop in report["hops"]]
        by_boundary = [sum(hop["bundle_bytes"] for hop in report["hops"] if hop["boundary"] == at) for at in range(4)]
        assert cost["crossings"] == report["totals"][config.depth.policy]
        assert cost["tensors"] == sum(hop["tensors"] for hop in report["hops"])
        assert (cost["largest_bundle_bytes"], cost["bytes_per_microbatch"]) == (max(bundles), sum(bundles))
        assert cost["busiest_boundary_bytes"] == max(by_boundary)
        assert cost["ratio_to_residual"] == max(hop["ratio_to_residual"] for hop in report["hops"])
        assert cost["memory_bytes"] == max(stage["memory_bytes"]["total"] for stage in report["stages"])
        assert cost["total_parameters"] == report["total_parameters"]
        assert cost["model_flops_per_token"] == report["model_flops_per_token"]
        tensors = logical_tensors(config.model, config.pattern).values()
        assert cost["router_parameters"] == sum(prod(each.shape) for each in tensors if each.role is Role.ROUTER)
        assert cost["edges"] == plan.transfer.pattern.num_edges


def test_a_llama_is_compared_with_lime_and_one_stage_sends_nothing() -> None:
    assert named(costs_of(make("depth.router=none", "parallel.pp=2"), "full")) == [
        ("none", None), ("full", "least"), ("full", "relay"),
    ]  # fmt: skip
    alone = costs_of(make("parallel.pp=1"))
    assert {cost["busiest_boundary_bytes"] for cost in alone} == {0} and " inf" not in compare_table(alone)


def test_rows_have_the_runs_warmup_and_no_limit() -> None:
    """The least memory with which the run's own pattern fits is too little for others; `auto` would take them elsewhere."""
    batch = "pipeline.num_microbatches=8", "data.global_batch_size=8", "depth.pattern=within_stage"
    needs = [memory.total_bytes for memory in plan_run(make(*batch)).memory]
    plan = plan_run(make(*batch, "pipeline.warmup=auto", f"run.memory={max(needs) // 1024 + 1}KiB"))
    rows = by_name([pattern_cost(config) for config in compared_configs(plan)])
    assert rows["within_stage", "least"]["memory_bytes"] == max(memory.total_bytes for memory in plan.memory)
    assert rows["full", "relay"]["memory_bytes"] > plan.config.run.memory_bytes


@pytest.mark.parametrize(
    "name", ("+".join(f"first:{count}" for count in range(1, 40)), "edges:" + "folder/" * 20 + "x")
)
def test_lines_stay_within_the_width(name: str) -> None:
    large = "model.num_layers=128", "model.hidden_size=8192", "model.vocab_size=200000", "data.seq_length=8192"
    costs = costs_of(make(*large, "run.dtype=bf16"), "first:1")
    costs[1] |= {"pattern": name}
    lines = compare_table(costs).splitlines()
    assert max(map(len, lines)) <= MAX_WIDTH and name[-8:] in lines[3]


# ---- the command


def compared(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", "run.yaml", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    (
        "parallel.pp=2 --compare first:2 last:3",
        "--compare first:2 last:3 parallel.pp=2",
        "--compare first:2 parallel.pp=2 last:3",
    ),
)
def test_patterns_and_overrides_in_any_order(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    report = compared(capsys, *arguments.split())
    assert report["layout"]["pp"] == 2
    assert named(report["compare"]) == [
        ("none", None), *((pattern, policy) for pattern in ("first:2", "last:3") for policy in POLICIES),
    ]  # fmt: skip


def test_patterns_that_weights_files_and_bytes_choose(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path(TRAINED), tree=RUN)
    Path("a.b=c.yaml").write_text("3: [0, 2]\n")
    patterns = "top_p:0.5", "budget:2KiB", "edges:a.b=c.yaml", "first:1 + stride:3", "within_stage"
    rows = by_name(compared(capsys, f"depth.weights_from={TRAINED}", "--compare", *patterns, "top_p:0.5")["compare"])
    assert len(rows) == 1 + 2 * len(patterns)
    for pattern in ("top_p:0.5", "budget:2KiB"):
        chosen = compared(capsys, f"depth.weights_from={TRAINED}", f"depth.pattern={pattern}")
        cost = rows[pattern, "least"]
        assert cost["edges"] == chosen["chosen_edges"]["num_kept"] > 0
        assert cost["bytes_per_microbatch"] == sum(hop["bundle_bytes"] for hop in chosen["hops"])
    assert rows["edges:a.b=c.yaml", "relay"]["edges"] == 2
    assert rows["within_stage", "relay"]["crossings"] == 0


def test_a_run_that_goes_on_chooses_by_its_own_routers(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("run/checkpoints/step_000005"), step=5, tree={**RUN, "depth": {"pattern": "last:2"}})
    going_on = "run.dir=run", "depth.pattern=last:2"
    cost = compared(capsys, *going_on, "--compare", "top_p:0.5")["compare"][1]
    switched = compared(capsys, *going_on, "depth.switch_at={5: top_p:0.5}")
    assert cost["edges"] == switched["chosen_edges"]["num_kept"] < 13


def test_text_and_picture_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.yaml", "--compare", "first:2", "--plot", "plan.svg"]) == 0
    out = capsys.readouterr().out
    assert "LLaMA" in out and "first:2" in out and "stride:2" not in out and Path("plan.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        ("--compare first:2 Frist:2", "--compare Frist:2: 'Frist:2' is not a pattern; use full, first:j"),
        ("--compare FULL", "--compare FULL: 'FULL' is not a pattern; use full"),
        ("--compare first:2,last:2", "--compare first:2,last:2: 'first:2,last:2' needs a whole number of at least 1"),
        ("--compare first:99999999999", "--compare first:99999999999: 'first:99999999999' needs a whole number"),
        ("--compare none", "--compare none: 'none' is not a pattern; use full"),
        ("--compare run.steps", "--compare run.steps: 'run.steps' is not a pattern"),
        ("--compare top_p:0.9", "--compare top_p:0.9: depth.weights_from: top_p chooses by trained routers; name a"),
        ("--compare top_p:2", "--compare top_p:2: top_p:2 needs a share above 0 and at most 1"),
        (
            "--compare top_p:0.9 depth.weights_from=none",
            "--compare top_p:0.9: depth.weights_from: none: neither a step_N folder",
        ),
        ("--compare budget:1", "--compare budget:1: budget of 1 bytes is below the residual's"),
        ("--compare edges:none.yaml", "--compare edges:none.yaml: edges file none.yaml: No such file"),
        (
            "--compare block:3",
            "--compare block:3: the block of layers 0 to 2 spans a stage boundary; choose pipeline.part",
        ),
        (
            "--compare top_p:0.5 depth.entry=hidden depth.router=dynamic",
            "--compare top_p:0.5: top_p:0.5 with depth.router=dynamic, whose weights cannot rank edges; use another",
        ),
        ("--compare first:2 parallel.pp=9", "parallel.pp: 9 stages for model.num_layers=8; use at most 8"),
        ("--compare --predict", "--compare: is of the plan, which --predict does not show; give one of them"),
        ("--predict --compare first:2", "--compare: is of the plan, which --predict does not show; give one of them"),
        ("--plot plan.svg --predict", "--plot: is of the plan, which --predict does not show; give one of them"),
        ("--compare --sweep 8", "--sweep: is part of a prediction; add --predict"),
        ("--compare first:2 --plot none/plan.svg", "--plot: none/plan.svg: No such file or directory; give a file"),
    ),
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: str, said: str) -> None:
    assert main(["plan", "run.yaml", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"lime-dist: {said}") and captured.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["run.yaml"]
