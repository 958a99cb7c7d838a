"""AdamW's parameter groups and the learning-rate schedule. Knows no DeepSpeed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lime_dist.config import Config, OptimConfig
from lime_dist.lime.model import LimeChunk, LimeStage
from lime_dist.lime.values import specified_parameters
from lime_dist.plan.tensors import Role


def build_optimizer(
    stage: LimeChunk | LimeStage, config: Config, placeholder: nn.Parameter | None = None
) -> torch.optim.AdamW:
    """torch's AdamW over three groups: decayed, undecayed, routers. Each group keeps its own peak rate as `peak_lr`.

    Routers are decayed where their kind says so; a model has one kind.

    placeholder: stands in for the routers of a stage that has none.
    """
    optim = config.optim
    return torch.optim.AdamW(
        _parameter_groups(stage, config, placeholder),
        lr=optim.lr,
        betas=(optim.betas[0], optim.betas[1]),
        eps=optim.eps,
        foreach=True,
    )


def _parameter_groups(
    stage: LimeChunk | LimeStage, config: Config, placeholder: nn.Parameter | None
) -> list[dict[str, Any]]:
    optim = config.optim
    router_decay = optim.weight_decay if config.depth.routing.decays_routers else 0.0
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    routers = [] if placeholder is None else [placeholder]
    for spec, parameter in specified_parameters(stage):
        group = routers if spec.role is Role.ROUTER else decayed if spec.role is Role.PROJECTION else undecayed
        group.append(parameter)
    groups = [
        {"name": "decayed", "params": decayed, "peak_lr": optim.lr, "weight_decay": optim.weight_decay},
        {"name": "undecayed", "params": undecayed, "peak_lr": optim.lr, "weight_decay": 0.0},
        {"name": "routers", "params": routers, "peak_lr": optim.router_lr, "weight_decay": router_decay},
    ]
    return [group for group in groups if group["params"]]


def lr_factor(optim: OptimConfig, step: int, num_steps: int) -> float:
    """The fraction of the peak rates at update `step` (from 0) of `num_steps`: linear warm-up, then the schedule, which ends at
    `optim.decay_steps` where that is set, so that a run can go on beyond it, or stop before.

    As in the authors' code: the first update of a warm-up has rate 0, and no later one less than `optim.min_lr`.
    """
    if step < optim.warmup_steps:
        return step / optim.warmup_steps
    horizon = optim.decay_steps or num_steps
    begin = horizon - optim.cooldown_steps if optim.lr_schedule == "wsd" else optim.warmup_steps
    progress = min(1.0, max(0.0, step - begin) / max(1, horizon - begin))
    return max(optim.min_lr, _SCHEDULES[optim.lr_schedule](progress))


_SCHEDULES: dict[str, Callable[[float], float]] = {  # from the beginning of the decay, 0, to its end, 1
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
    "wsd": lambda progress: 1 - progress,  # MiniCPM, arXiv 2404.06395, section 4, whose decay is exponential
}


def rates(config: Config, factor: float) -> dict[str, float]:
    """The learning rate at `factor` of its peak, and that of the routers where the model has some."""
    router_lr = {"router_lr": config.optim.router_lr * factor} if config.depth.learns_routers else {}
    return {"lr": config.optim.lr * factor, **router_lr}


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group at `factor` of its own peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
