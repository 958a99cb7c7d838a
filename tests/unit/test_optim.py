"""AdamW's groups and the learning-rate schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lime_dist.config import Config, OptimConfig, parse_config
from lime_dist.lime.model import LimeChunk, plain_model
from lime_dist.training.optim import build_optimizer, lr_factor, rates, set_lr


def make_run(*overrides: str) -> tuple[Config, LimeChunk]:
    tree = {
        "model": {"num_layers": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 40},
        "optim": {"lr": 0.5, "router_lr": 0.25, "weight_decay": 0.125, "betas": [0.7, 0.8], "eps": 1e-3},
    }
    config = parse_config(tree, overrides)
    return config, plain_model(config.model, config.pattern)


def groups_by_parameter(optimizer: torch.optim.Optimizer, stage: LimeChunk) -> dict[str, tuple[float, float]]:
    """Peak rate and weight decay of each parameter."""
    names = {parameter: name for name, parameter in stage.named_parameters()}
    return {
        names[parameter]: (group["peak_lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("tied", [True, False])
def test_norms_embedding_and_routers_are_not_decayed_and_routers_have_a_rate_of_their_own(tied: bool) -> None:
    config, stage = make_run(f"model.tie_embeddings={str(tied).lower()}")
    optimizer = build_optimizer(stage, config)
    assert optimizer.defaults["betas"] == (0.7, 0.8) and optimizer.defaults["eps"] == 1e-3
    groups = groups_by_parameter(optimizer, stage)
    assert groups.keys() == dict(stage.named_parameters()).keys()
    for name, group in groups.items():
        if "lime_router" in name:
            assert group == (0.25, 0.0), name
        elif "norm" in name or name.startswith("embed_tokens"):
            assert group == (0.5, 0.0), name
        else:
            assert group == (0.5, 0.125), name
    assert ("lm_head.weight" in groups) is not tied


def test_without_routers_there_is_no_router_group_unless_a_placeholder_asks_for_one() -> None:
    config, stage = make_run("depth.router=none")
    assert [group["name"] for group in build_optimizer(stage, config).param_groups] == ["decayed", "undecayed"]
    placeholder = nn.Parameter(torch.zeros(1))
    group = build_optimizer(stage, config, placeholder).param_groups[-1]
    assert group["name"] == "routers" and group["params"] == [placeholder]


def test_set_lr_scales_each_groups_own_peak() -> None:
    config, stage = make_run()
    optimizer = build_optimizer(stage, config)
    for factor in (0.5, 0.1):
        set_lr(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.5 * factor, 0.5 * factor, 0.25 * factor]


COSINE = {"warmup_steps": 4, "lr_schedule": "cosine"}
WSD = {"warmup_steps": 4, "lr_schedule": "wsd"}
FACTORS = [  # settings, step, steps in all, factor
    (COSINE, 0, 12, 0.0),
    (COSINE, 1, 12, 0.25),
    (COSINE, 3, 12, 0.75),
    (COSINE, 4, 12, 1.0),
    (COSINE, 8, 12, 0.5),
    (COSINE, 6, 12, 0.5 + 0.5 * math.cos(math.pi / 4)),
    (COSINE, 12, 12, 1e-6),
    (COSINE, 99, 12, 1e-6),
    ({**COSINE, "min_lr": 0.2}, 8, 12, 0.5),
    ({**COSINE, "min_lr": 0.2}, 12, 12, 0.2),
    ({**COSINE, "warmup_steps": 0}, 0, 10, 1.0),
    ({**COSINE, "warmup_steps": 20}, 9, 10, 0.45),
    ({"warmup_steps": 4, "lr_schedule": "linear"}, 4, 12, 1.0),
    ({"warmup_steps": 4, "lr_schedule": "linear"}, 6, 12, 0.75),
    ({"warmup_steps": 4, "lr_schedule": "linear"}, 12, 12, 1e-6),
    ({"warmup_steps": 2, "lr_schedule": "constant"}, 1, 9, 0.5),
    ({"warmup_steps": 2, "lr_schedule": "constant"}, 8, 9, 1.0),
    ({**COSINE, "decay_steps": 12}, 8, 100, 0.5),
    ({**COSINE, "decay_steps": 12, "min_lr": 0.2}, 50, 100, 0.2),
    ({**COSINE, "decay_steps": 20}, 12, 12, 0.5),
    ({**WSD, "cooldown_steps": 4}, 2, 12, 0.5),
    ({**WSD, "cooldown_steps": 4}, 8, 12, 1.0),
    ({**WSD, "cooldown_steps": 4}, 10, 12, 0.5),
    ({**WSD, "cooldown_steps": 4, "min_lr": 0.1}, 12, 12, 0.1),
    ({**WSD, "cooldown_steps": 4, "decay_steps": 20}, 12, 12, 1.0),
    ({**WSD, "cooldown_steps": 0}, 11, 12, 1.0),
]


@pytest.mark.parametrize(("settings", "step", "num_steps", "factor"), FACTORS)
def test_lr_factor(settings: dict, step: int, num_steps: int, factor: float) -> None:
    assert lr_factor(OptimConfig(**settings), step, num_steps) == pytest.approx(factor, abs=1e-12)


def test_routers_have_a_rate_where_there_are_some() -> None:
    assert rates(make_run()[0], 0.5) == {"lr": 0.25, "router_lr": 0.125}
    for without in ("depth.router=none", "depth.router=average"):
        assert rates(make_run(without)[0], 0.5) == {"lr": 0.25}
