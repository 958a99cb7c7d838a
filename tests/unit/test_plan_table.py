"""The stage table: totals, routing work and the proven minimum against counting by hand, and the JSON's keys."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest

from lime_dist.config import Config, check_config, load_config
from lime_dist.depth.pattern import Pattern
from lime_dist.formats import format_bytes
from lime_dist.plan.flops import routing_flops_per_token
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.stages import plan_transfer_of
from lime_dist.plan.table import POLICIES, plan_report, stage_table
from lime_dist.plan.transfer import plan_transfer

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SIZES = {  # counted by hand below
    "model": {"hidden_size": 128, "intermediate_size": 352, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 1024},
    "data": {"global_batch_size": 16, "seq_length": 128},
}
FULL_TOTALS = {4: (4, 6), 8: (16, 28), 16: (64, 120)}  # stages: (least, relay) in units of the layers of a stage


def make_config(*overrides: str) -> Config:
    sizes = [f"{section}.{key}={size}" for section, keys in SIZES.items() for key, size in keys.items()]
    return check_config(load_config(QUICKSTART, [*sizes, *overrides]))


@pytest.mark.parametrize("layers_per_stage", (1, 3))
@pytest.mark.parametrize("pp", FULL_TOTALS)
def test_totals_of_the_full_pattern(pp: int, layers_per_stage: int) -> None:
    report = plan_report(plan_run(make_config(f"parallel.pp={pp}", f"model.num_layers={layers_per_stage * pp}")))
    least, relay = FULL_TOTALS[pp]
    assert report["totals"] == {"least": least * layers_per_stage, "relay": relay * layers_per_stage}
    assert report["proven_minimum"] == report["totals"]["least"]


def test_keys_and_numbers_of_the_report() -> None:
    config = make_config("parallel.pp=4", "depth.policy=least")
    report = plan_report(plan_run(config))
    assert report["layout"] == {"tp": 1, "pp": 4, "dp": 1}
    assert (report["pattern"], report["policy"]) == ("full", "least")
    held, copied = (
        [stage[key] for stage in report["stages"]] for key in ("parameters_per_tp_rank", "tied_copy_parameters")
    )
    assert copied == [0, 0, 0, 1024 * 128] and report["total_parameters"] == sum(held) - sum(copied)
    assert report["model_flops_per_step"] == 16 * 128 * report["model_flops_per_token"]
    assert [(stage["stage_index"], stage["layers"]) for stage in report["stages"]] == [
        (0, [0, 1]), (1, [2, 3]), (2, [4, 5]), (3, [6, 7])
    ]  # fmt: skip
    tokens, hidden, kv = 4 * 128, 128, 2 * 64
    for index, boundary in enumerate(report["hops"]):
        assert (boundary["hop"], boundary["boundary"], boundary["stages"]) == (index, index, [index, index + 1])
        tensors = 1 + len(boundary["raw_entries"]) + len(boundary["partial_sums"])
        assert boundary["tensors"] == boundary["fewest_tensors"] == tensors
        assert boundary["residual_bytes"] == 4 * tokens * hidden
        assert boundary["entry_bytes"] == 4 * tokens * kv
        assert boundary["bundle_bytes"] == 4 * tokens * (hidden + (tensors - 1) * kv)
    # Stage 1 holds what it received and made, for each of the three microbatches that 1F1B has in flight there.
    assert report["stages"][1]["entries_in_flight_bytes"] == 3 * 4 * report["hops"][0]["entry_bytes"]
    assert report["stages"][1]["received_bytes"] == report["hops"][0]["bundle_bytes"]


def test_line_of_the_model() -> None:
    """By hand, without routers: LLaMA's matrices, twice their number a token forward and three times that in all."""
    report = plan_report(plan_run(make_config("parallel.pp=2", "parallel.tp=4", "depth.router=none")))
    matrices = 8 * (128 * (2 * 128 + 2 * 64) + 3 * 128 * 352) + 1024 * 128
    assert report["total_parameters"] == matrices + 17 * 128, "17 norms; the embedding is the head too"
    assert report["model_flops_per_token"] == 3 * (2 * matrices + 8 * 4 * 128 * 128)
    line = stage_table(plan_run(make_config("parallel.pp=2", "parallel.tp=4", "depth.router=none"))).splitlines()[1]
    assert line == "1,607,808 parameters; model FLOPs, forward and backward: 11.2M a token, 23.0G a step"


def test_the_copy_of_a_tied_embedding_is_told() -> None:
    said = "parameters/rank: the last stage's with its copy of the tied embedding, 131,072"
    assert said in stage_table(plan_run(make_config("parallel.pp=4"))).splitlines()
    assert said in stage_table(plan_run(make_virtual(4, 2))).splitlines()
    for without in ("parallel.pp=1", "model.tie_embeddings=false"):
        assert "copy" not in stage_table(plan_run(make_config("parallel.pp=4", without)))


def make_virtual(pp: int, virtual_stages: int, *overrides: str) -> Config:
    layout = f"parallel.pp={pp}", f"parallel.virtual_stages={virtual_stages}"
    return make_config("model.num_layers=32", *layout, *overrides)


def test_report_of_virtual_stages() -> None:
    report = plan_report(plan_run(make_virtual(4, 4)))
    assert report["virtual_stages"] == 4 and "boundaries" not in report and report["warmups"] == []
    assert [stage["chunks"] for stage in report["stages"]] == [
        [stage, stage + 4, stage + 8, stage + 12] for stage in range(4)
    ]
    assert report["stages"][1]["layers"] == [2, 3, 10, 11, 18, 19, 26, 27]
    assert [(hop["hop"], hop["boundary"]) for hop in report["hops"]] == [(hop, hop % 4) for hop in range(15)]
    assert report["hops"][3]["stages"] == [3, 0] and report["hops"][4]["stages"] == [0, 1]
    assert {hop["fewest_tensors"] for hop in report["hops"]} == {None}
    for stage in range(4):
        received = [hop["bundle_bytes"] for hop in report["hops"] if hop["stages"][1] == stage]
        assert report["stages"][stage]["received_bytes"] == sum(received)


@pytest.mark.parametrize(("virtual_stages", "least", "relay"), ((1, 32, 48), (2, 60, 72), (4, 78, 84)))
def test_totals_of_virtual_stages(virtual_stages: int, least: int, relay: int) -> None:
    config = make_virtual(4, virtual_stages)
    report = plan_report(plan_run(config))
    assert (report["totals"], report["proven_minimum"]) == ({"least": least, "relay": relay}, least)
    where = "boundaries" if virtual_stages == 1 else "hops"
    assert f"over all {where}: least {least}, relay {relay}; proven minimum {least}" in stage_table(plan_run(config))


def test_table_of_virtual_stages() -> None:
    lines = stage_table(plan_run(make_virtual(4, 2))).splitlines()
    assert lines[0] == "layout tp=1 pp=4 dp=1, 2 virtual stages, pattern full, policy least"
    (stage,) = (line for line in lines if line.strip().startswith("1    4-7, 20-23  "))
    (hop,) = (line for line in lines if line.strip().startswith("3 > 4   3 > 0  "))
    assert stage.endswith("MiB") and hop.split()[6] == "4-15"


@pytest.mark.parametrize(
    "overrides",
    (
        ["parallel.pp=64", "pipeline.num_microbatches=128", "data.global_batch_size=128", "pipeline.warmup=100"],
        ["parallel.pp=64", "depth.pattern=stride:2"],
        ["parallel.pp=16", "parallel.virtual_stages=8", "pipeline.num_microbatches=16", "data.global_batch_size=16"],
        ["parallel.pp=2", "parallel.virtual_stages=64", "depth.pattern=stride:3", "depth.policy=relay"],
        ["parallel.pp=8", "parallel.virtual_stages=4", "depth.pattern=first:2", "run.dtype=bf16", "parallel.tp=2"],
    ),
)
def test_lines_are_at_most_120_wide(overrides: list[str]) -> None:
    config = make_config("model.num_layers=128", *overrides)
    assert max(map(len, stage_table(plan_run(config)).splitlines())) <= 120


def test_long_lists_of_layers_are_shortened() -> None:
    config = make_config("parallel.pp=2", "model.num_layers=64", "depth.pattern=stride:3", "depth.policy=relay")
    assert plan_report(plan_run(config))["hops"][0]["raw_entries"] == [*range(0, 31, 3), 31]
    assert " 0, 3, 6, 9, ..., 30-31 " in stage_table(plan_run(config))
    assert " 0-3, 16-19 " in stage_table(plan_run(make_virtual(4, 2)))


def warmups_line(config: Config) -> str:
    return stage_table(plan_run(config)).splitlines()[-1]


def test_what_a_warmup_costs() -> None:
    batch = "parallel.pp=4", "pipeline.num_microbatches=16", "data.global_batch_size=16"
    plain, eager = plan_run(make_config(*batch)), plan_run(make_config(*batch, "pipeline.warmup=7"))
    needs = [max(memory.total_bytes for memory in plan.memory) for plan in (plain, eager)]
    assert needs[0] < needs[1]
    report = plan_report(plan_run(make_config(*batch, "pipeline.warmup=5")))
    described = [
        (one["warmup"], one["name"], one["is_own"], one["microbatches_in_flight"]) for one in report["warmups"]
    ]
    assert described == [(4, "plain", False, 4), (5, None, True, 5), (7, "eager", False, 7)]
    assert [one["memory_bytes"] for one in report["warmups"]][::2] == needs
    assert warmups_line(make_config(*batch)) == (
        f"warmup 4 (plain, this run): 4 in flight, {format_bytes(needs[0])} a rank; "
        f"7 (eager, hides transfers): 7, {format_bytes(needs[1])}"
    )
    assert "; 7 (eager, hides transfers, this run): 7, " in warmups_line(make_config(*batch, "pipeline.warmup=7"))
    assert "; 5 (this run): 5, " in warmups_line(make_config(*batch, "pipeline.warmup=5"))


def test_a_warmup_beyond_the_memory_is_priced_too() -> None:
    batch = "parallel.pp=4", "pipeline.num_microbatches=16", "data.global_batch_size=16"
    needs = [one["memory_bytes"] for one in plan_report(plan_run(make_config(*batch)))["warmups"]]
    limited = plan_report(plan_run(make_config(*batch, f"run.memory={needs[0] // 1024 + 1}KiB")))
    assert [one["memory_bytes"] for one in limited["warmups"]] == needs


@pytest.mark.parametrize(
    "overrides", (["parallel.pp=1"], ["pipeline.schedule=gpipe"], ["parallel.pp=2", "parallel.virtual_stages=2"])
)
def test_no_choice_of_warmup(overrides: list[str]) -> None:
    config = make_config(*overrides)
    assert plan_report(plan_run(config))["warmups"] == [] and "warmup" not in stage_table(plan_run(config))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pattern", ("full", "first:2", "stride:3"))
def test_routing_flops_by_counting(pattern: str, policy: str) -> None:
    config = make_config("parallel.pp=3", f"depth.pattern={pattern}", f"depth.policy={policy}")
    transfer, model = plan_transfer_of(config), config.model
    counted = [0, 0, 0]
    for reader, sources in enumerate(transfer.pattern.sources):
        for source in sources if transfer.pattern.has_router(reader) else ():
            stage = transfer.added_at(reader, source)
            # Each head of the sum takes each head of the entry, element by element: a product and an addition.
            heads = product(range(model.kv_heads), range(model.kv_heads))
            counted[stage] += sum(2 for _ in product(heads, ("key", "value"), range(model.head_dim)))
    assert [routing_flops_per_token(model, transfer.chunk(index)) for index in range(3)] == counted
    assert [stage["routing_flops_per_token"] for stage in plan_report(plan_run(config))["stages"]] == counted


def smallest_cover(edges: list[tuple[int, int]]) -> int:
    """The smallest vertex cover by trying: one end of the first edge must be in it."""
    if not edges:
        return 0
    return 1 + min(smallest_cover([edge for edge in edges if end not in edge]) for end in edges[0])


def test_least_is_the_smallest_cover_of_each_boundary() -> None:
    random.seed(0)
    for _ in range(50):
        num_layers, density = random.randint(2, 8), random.random()
        pattern = Pattern(
            "random",
            tuple((*(i for i in range(j) if random.random() < density), j) for j in range(num_layers)),
        )
        stages = tuple(range(layer, layer + 1) for layer in range(num_layers))
        plan = plan_transfer(pattern, stages, policy="least")
        for boundary, planned in enumerate(plan.hops):
            spanning = [(i, j) for j in range(boundary + 1, num_layers) for i in pattern.sources[j] if i < boundary + 1]
            assert smallest_cover(spanning) == len(planned.raw_entries) + len(planned.partial_sums)


def test_table_says_that_the_minimum_is_reached() -> None:
    text = stage_table(plan_run(make_config("parallel.pp=4")))
    assert "least 8, relay 12; proven minimum 8, which least reaches" in text


def test_table_claims_nothing_where_larger_sums_cost_more() -> None:
    """With fp32 sums over bf16 entries `least` counts bytes, and may take more tensors than the minimum."""
    config = make_config("parallel.pp=8", "run.dtype=bf16", "depth.partial_sum_dtype=fp32")
    report = plan_report(plan_run(config))
    assert report["totals"]["least"] > report["proven_minimum"]
    assert "reaches" not in stage_table(plan_run(config))


@pytest.mark.parametrize(
    "costs", (["run.dtype=bf16", "depth.partial_sum_dtype=fp32"], ["pipeline.boundary_cost=[1, 9, 1, 9]"])
)
def test_the_minimum_of_virtual_stages_counts_tensors(costs: list[str]) -> None:
    """Whatever `least` weighs; hop costs make it take more tensors here."""
    report = plan_report(plan_run(make_virtual(4, 4, *costs)))
    assert report["proven_minimum"] == 78 <= report["totals"]["least"]
