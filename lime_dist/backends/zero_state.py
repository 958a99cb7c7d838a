"""What a checkpoint needs of DeepSpeed's optimiser: the fp32 weights and Adam moments of each parameter, whole.

Hides where each ZeRO stage keeps them. Collective: every function, over the dp group, in the same order of
parameters on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from lime_dist.backends.deepspeed import MOMENTS, ZeroOptimizer
from lime_dist.lime.model import LimeStage
from lime_dist.lime.values import assemble_local, specified_parameters
from lime_dist.plan.tensors import LogicalTensor

KINDS = ("weight", *MOMENTS)


def get_state(optimizer: ZeroOptimizer, parameter: nn.Parameter, kind: str) -> Tensor:
    """fp32 tensor of the parameter's shape; `kind` is one of KINDS."""
    if optimizer.zero_stage == 0:
        master = _replicated_master(optimizer, parameter)
        return master.detach() if kind == "weight" else optimizer.torch_optimizer.state[master][kind]
    if kind == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


@torch.no_grad()
def set_state(optimizer: ZeroOptimizer, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """The reverse of `get_state`; for a weight also the copy that the model computes with."""
    value = value.to(device=optimizer.device, dtype=torch.float32)
    if optimizer.zero_stage == 3:
        _set_partitioned(optimizer, parameter, kind, value)
        return
    if kind == "weight":
        parameter.copy_(value)
    if optimizer.zero_stage == 0:
        master = _replicated_master(optimizer, parameter)
        (master.data if kind == "weight" else optimizer.torch_optimizer.state[master][kind]).copy_(value)
    elif kind == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


def set_weights(optimizer: ZeroOptimizer, stage: LimeStage, values_of: Callable[[LogicalTensor], Tensor]) -> None:
    """Replace all weights by whole logical tensors."""
    for spec, parameter in specified_parameters(stage):
        set_state(optimizer, parameter, "weight", assemble_local(spec, values_of))


def set_num_updates(optimizer: ZeroOptimizer, num_updates: int) -> None:
    """Tell AdamW, whose bias correction depends on it, how many updates the moments come from."""
    for master in optimizer.masters:
        optimizer.torch_optimizer.state[master]["step"].fill_(num_updates)


def _replicated_master(optimizer: ZeroOptimizer, parameter: nn.Parameter) -> Tensor:
    return next(master for candidate, master in optimizer.replicated_masters() if candidate is parameter)


def _set_partitioned(optimizer: ZeroOptimizer, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    """ZeRO 3. DeepSpeed's setter of whole tensors fails where the replicas do not divide them, so set the share."""
    share = safe_get_local_fp32_param(parameter).numel()
    start = share * optimizer.dp_rank
    flat = value.flatten()[start : start + share]
    flat = nn.functional.pad(flat, (0, share - flat.numel()))
    if kind == "weight":
        safe_set_local_fp32_param(parameter, flat)
        parameter.ds_tensor.data.copy_(flat)  # type: ignore[attr-defined]
    else:
        safe_set_local_optimizer_state(parameter, flat, kind)
