"""The shipped configs: each is sound and can be planned, and each LIMe config has a LLaMA twin to be compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lime_dist.config import Config, check_config, load_config, to_dict
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.table import plan_report, stage_table

CONFIGS = Path(__file__).parents[2] / "configs"
# layers, hidden, intermediate, heads, KV heads, steps: arXiv 2502.09245's 1B and deep set-ups
SIZES = {
    "1b_gqa": (16, 2048, 8192, 32, 8, 20_000),
    "1b_mha": (16, 2048, 8192, 32, 32, 20_000),
    "deep_32": (32, 256, 1024, 8, 8, 5_000),
    "deep_64": (64, 256, 1024, 8, 8, 5_000),
    "deep_128": (128, 256, 1024, 8, 8, 5_000),
}


def load(name: str) -> Config:
    return check_config(load_config(CONFIGS / f"{name}.yaml"))


def leaves(tree: object, prefix: str = "") -> dict[str, object]:
    """Values by dotted key."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, child in tree.items() for key, value in leaves(child, f"{prefix}.{name}").items()}


def crosses(boundary: dict) -> bool:
    """Whether anything but the residual stream does."""
    return boundary["bundle_bytes"] > boundary["residual_bytes"]


def test_these_configs_are_shipped() -> None:
    names = {f"{family}_{size}" for family in ("lime", "llama") for size in SIZES}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} >= names | {"quickstart"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_can_be_planned(path: Path) -> None:
    config = load(path.stem)
    report = plan_report(plan_run(config))
    assert [layer for stage in report["stages"] for layer in stage["layers"]] == list(range(config.model.num_layers))
    assert len(report["hops"]) == config.parallel.pp - 1
    assert stage_table(plan_run(config)).startswith("layout ")


@pytest.mark.parametrize("size", SIZES)
def test_more_ranks_make_more_replicas(size: str) -> None:
    config = load_config(CONFIGS / f"lime_{size}.yaml")
    for dp in (1, 2, 4, 16):
        settled = check_config(config, dp * config.layout.world_size)
        assert (settled.layout.dp, settled.microbatch_size) == (dp, config.data.micro_batch_size)


@pytest.mark.parametrize("size", SIZES)
def test_twins_differ_in_the_router_only(size: str) -> None:
    lime, llama = load(f"lime_{size}"), load(f"llama_{size}")
    ours, theirs = leaves(to_dict(lime)), leaves(to_dict(llama))
    assert {key for key in ours | theirs if ours[key] != theirs[key]} == {".depth.router", ".run.dir"}
    assert (lime.depth.router, lime.depth.pattern, llama.depth.router) == ("static", "full", "none")
    assert lime.run.dir == f"runs/lime_{size}" and llama.run.dir == f"runs/llama_{size}"
    # The twin sends the residual stream alone.
    assert not any(map(crosses, plan_report(plan_run(llama))["hops"]))
    assert all(map(crosses, plan_report(plan_run(lime))["hops"]))


@pytest.mark.parametrize("name", [f"{family}_{size}" for family in ("lime", "llama") for size in SIZES])
def test_numbers_are_the_papers(name: str) -> None:
    config, size = load(name), name.partition("_")[2]
    model, optim, data = config.model, config.optim, config.data
    assert SIZES[size] == (
        model.num_layers, model.hidden_size, model.intermediate_size, model.num_heads, model.kv_heads, config.run.steps
    )  # fmt: skip
    assert (model.vocab_size, model.tie_embeddings, config.run.dtype) == (50_257, True, "bf16")
    assert (data.seq_length, data.global_batch_size) == (2048, 1024)
    assert (optim.lr, optim.router_lr, optim.warmup_steps, optim.lr_schedule) == (1e-3, 1e-2, 200, "cosine")
    assert (optim.betas, optim.eps, optim.weight_decay, optim.max_grad_norm) == ([0.9, 0.95], 1e-8, 0.1, 1.0)
    assert (optim.min_lr, config.run.seed) == (1e-6, 42)
