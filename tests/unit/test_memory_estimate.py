"""The memory estimate by hand, and how it follows the config; ranks hold what it says in tests/distributed."""

from __future__ import annotations

import pytest

from lime_dist.config import Config, check_config, parse_config
from lime_dist.plan.memory import StageMemory
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.table import plan_report, stage_table

HIDDEN, INNER, HEADS, VOCAB, TOKENS = 64, 160, 4, 512, 32
MODEL = {"num_layers": 1, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_heads": HEADS, "vocab_size": VOCAB}
BASE = {
    "model": MODEL,
    "depth": {"router": "none"},
    "data": {"seq_length": TOKENS, "global_batch_size": 1},
    "run": {"dtype": "bf16", "device": "cuda"},
}
PARAMETERS = VOCAB * HIDDEN + 4 * HIDDEN**2 + 3 * HIDDEN * INNER + 3 * HIDDEN
DEEP = ("model.num_layers=8", "depth.router=static", "data.global_batch_size=16", "pipeline.num_microbatches=4")


def make_config(*overrides: str) -> Config:
    config = parse_config(BASE, overrides)
    return check_config(config, config.layout.world_size)


def estimate(*overrides: str) -> StageMemory:
    """Of the first stage."""
    return plan_run(make_config(*overrides)).memory[0]


def test_one_layer_by_hand() -> None:
    """bf16 on a GPU; a LLaMA layer keeps 2 bytes of each: two norms' inputs and outputs, queries, keys, the fused
    projection that values lie in, the attention's output, four inner rows; and fp32 figures a row."""
    layer = 2 * TOKENS * (4 * HIDDEN + 2 * HIDDEN + HIDDEN + 3 * HIDDEN + 4 * INNER) + 4 * TOKENS * (2 + HEADS)
    final_norm = 2 * TOKENS * 2 * HIDDEN + 4 * TOKENS
    largest_gradient, logits_gradient = 2 * VOCAB * HIDDEN, 2 * TOKENS * VOCAB
    found = estimate("deepspeed.zero_optimization.stage=1")
    assert found == StageMemory(
        weights=2 * PARAMETERS,
        gradients=4 * PARAMETERS,
        optimizer=12 * PARAMETERS,
        activations=layer + final_norm,
        entries=0,
        sums=0,
        logits=4 * TOKENS * VOCAB,
        buffers=largest_gradient + logits_gradient,
        update=4 * PARAMETERS,  # 8 bytes a parameter, where gradients were
    )
    assert found.total_bytes == 18 * PARAMETERS + max(
        found.update, layer + final_norm + 6 * TOKENS * VOCAB + 2 * VOCAB * HIDDEN
    )


@pytest.mark.parametrize(("zero", "per_parameter"), ((0, 2 + 4 + 12), (1, 2 + 4 + 3), (2, 2 + 1 + 3), (3, 2.5 + 1 + 3)))
def test_zero_shares_among_four_replicas(zero: int, per_parameter: float) -> None:
    found = estimate("parallel.dp=4", "data.global_batch_size=4", f"deepspeed.zero_optimization.stage={zero}")
    assert found.weights + found.gradients + found.optimizer == per_parameter * PARAMETERS


def test_zero_3_keeps_few_parameters_whole_if_told_so() -> None:
    zero = "deepspeed.zero_optimization={stage: 3, stage3_max_live_parameters: 1000, reduce_bucket_size: 5000}"
    found = estimate("parallel.dp=2", "data.global_batch_size=2", zero)
    assert found.weights == PARAMETERS + 2 * 1000
    whole_bucket = estimate("parallel.dp=2", "data.global_batch_size=2", "deepspeed.zero_optimization.stage=3")
    assert whole_bucket.buffers - found.buffers == 2 * (500_000_000 - 5000)


def test_a_cpu_keeps_more_of_each_norm_and_auto_means_a_gpu() -> None:
    on_gpu, on_cpu = estimate(), estimate("run.device=cpu")
    assert estimate("run.device=auto") == on_gpu
    assert on_cpu.activations - on_gpu.activations == 3 * TOKENS * HIDDEN * (4 + 4 - 2)


def test_earlier_stages_hold_more_microbatches() -> None:
    stages = plan_run(make_config(*DEEP, "parallel.pp=4")).memory
    activations = [stage.activations for stage in stages]
    assert activations == sorted(activations, reverse=True) and activations[0] > 3 * activations[3]
    assert [bool(stage.logits) for stage in stages] == [False, False, False, True]
    assert stages[0].sums == 0 < stages[1].sums  # nothing is received, so no sum of a reader spans stages


def test_recomputation_trades_activations_for_sums() -> None:
    kept, again = (
        plan_run(make_config(*DEEP, "parallel.pp=4", f"parallel.recompute={what}")).memory for what in ("none", "layer")
    )
    assert again[1].activations < kept[1].activations / 2
    assert again[1].sums == 3 * kept[1].sums > 0  # the layers of all microbatches in flight read them again
    assert again[3].sums == kept[3].sums > 0


def test_sequence_parallelism_shares_the_norms() -> None:
    plain, shared = (estimate(*DEEP, "parallel.tp=2", f"parallel.sequence_parallel={on}") for on in ("false", "true"))
    tokens = 4 * TOKENS
    assert plain.activations - shared.activations == (8 * 2 + 1) * (tokens // 2) * (2 * 2 * HIDDEN + 4)


def test_the_plan_shows_it() -> None:
    config = make_config(*DEEP, "parallel.pp=2")
    stages = plan_report(plan_run(config))["stages"]
    for stage, memory in zip(stages, plan_run(config).memory, strict=True):
        parts = dict(stage["memory_bytes"])
        assert parts.pop("total") == memory.total_bytes
        assert StageMemory(**parts) == memory
    head, *_ = (line for line in stage_table(plan_run(config)).splitlines() if "parameters/rank" in line)
    assert head.split("  ")[-1] == "memory/rank"


def test_a_save_behind_training_takes_host_memory() -> None:
    sharded, behind = ("parallel.dp=2", "data.global_batch_size=2"), "checkpoint.asynchronous=true"
    assert estimate(*sharded).staged == 0
    for zero in (1, 2, 3):
        found = estimate(*sharded, behind, f"deepspeed.zero_optimization.stage={zero}")
        assert found.staged == 12 * PARAMETERS // 2
        assert found.total_bytes == estimate(*sharded, f"deepspeed.zero_optimization.stage={zero}").total_bytes
    found = estimate(*sharded, behind, "deepspeed.zero_optimization.stage=0")
    assert 12 * PARAMETERS // 2 < found.staged < 12 * PARAMETERS, "every second parameter as a whole"
    lines = stage_table(plan_run(make_config(behind))).splitlines()
    assert "a save behind training copies up to " in lines[-1]
