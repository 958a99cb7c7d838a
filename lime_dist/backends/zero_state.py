"""What a checkpoint needs of DeepSpeed's optimiser: the fp32 weights and Adam moments that this replica has.

Hides where each ZeRO stage keeps them. A replica's *share* of a parameter is a range of its elements, in row-major order:
what it updates under ZeRO, and without it, where all replicas have everything, every dp-th parameter as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from lime_dist.backends.deepspeed import ZeroOptimizer
from lime_dist.lime.model import LimeStage
from lime_dist.lime.values import assemble_local, specified_parameters
from lime_dist.plan.tensors import KINDS, LogicalTensor, ParameterSpec


def get_state(optimizer: ZeroOptimizer, parameter: nn.Parameter, kind: str) -> Tensor:
    """fp32 tensor of the parameter's shape; `kind` is one of KINDS. Collective: dp group, in the same order on all."""
    if optimizer.zero_stage == 0:
        return _replicated(optimizer, parameter, kind)
    if kind == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


# ---- shares


@dataclass(frozen=True)
class Share:
    """The elements `start` to `stop` of a parameter; none where they are equal."""

    spec: ParameterSpec
    parameter: nn.Parameter
    start: int
    stop: int


def own_shares(optimizer: ZeroOptimizer, stage: LimeStage) -> list[Share]:
    """This replica's, of every parameter of its stage."""
    return [
        Share(spec, parameter, *_range(optimizer, parameter, index))
        for index, (spec, parameter) in enumerate(specified_parameters(stage))
    ]


def _range(optimizer: ZeroOptimizer, parameter: nn.Parameter, index: int) -> tuple[int, int]:
    if optimizer.zero_stage == 0:
        return 0, parameter.numel() if optimizer.dp_rank == index % optimizer.dp_size else 0
    if optimizer.zero_stage == 3:
        share, size = parameter.ds_tensor.numel(), parameter.ds_numel  # type: ignore[attr-defined]
        return min(share * optimizer.dp_rank, size), min(share * (optimizer.dp_rank + 1), size)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return 0, 0
    place = mapping.lp_fragment_address
    return place.start, place.start + place.numel


def read_share(optimizer: ZeroOptimizer, share: Share, kind: str) -> Tensor:
    """fp32 [stop - start]; where it lies already, so that an update changes it."""
    length = share.stop - share.start
    if optimizer.zero_stage == 0:
        return _replicated(optimizer, share.parameter, kind).flatten()[:length]
    if optimizer.zero_stage == 3:
        is_weight = kind == "weight"
        found = (
            safe_get_local_fp32_param(share.parameter)
            if is_weight
            else safe_get_local_optimizer_state(share.parameter, kind)
        )
        return found.detach()[:length]
    return _fragment(share.parameter, kind)


@torch.no_grad()
def write_share(optimizer: ZeroOptimizer, share: Share, kind: str, values: Tensor) -> None:
    """The reverse of `read_share`. The weights that the model computes with follow in `share_weights`."""
    if optimizer.zero_stage == 3:
        _write_partition(share.parameter, kind, values)
    else:
        read_share(optimizer, share, kind).copy_(values)


@torch.no_grad()
def share_weights(optimizer: ZeroOptimizer, stage: LimeStage) -> None:
    """After `write_share`: every replica gets what it has of the others' shares. Collective: dp group."""
    if optimizer.zero_stage == 0:
        for index, (_, parameter) in enumerate(specified_parameters(stage)):
            for kind in KINDS:
                dist.broadcast(
                    _replicated(optimizer, parameter, kind),
                    group=optimizer.dp_group,
                    group_src=index % optimizer.dp_size,
                )
            parameter.copy_(_replicated(optimizer, parameter, "weight"))
    elif optimizer.zero_stage < 3:
        optimizer.engine.optimizer.update_lp_params()


def set_weights(optimizer: ZeroOptimizer, stage: LimeStage, values_of: Callable[[LogicalTensor], Tensor]) -> None:
    """Replace all weights by whole logical tensors. Collective: dp group."""
    for share in own_shares(optimizer, stage):
        if share.start < share.stop:
            local = assemble_local(share.spec, values_of).flatten()
            write_share(optimizer, share, "weight", local[share.start : share.stop])
    share_weights(optimizer, stage)


def set_num_updates(optimizer: ZeroOptimizer, num_updates: int) -> None:
    """Tell AdamW, whose bias correction depends on it, how many updates the moments come from."""
    for master in optimizer.masters:
        optimizer.torch_optimizer.state[master]["step"].fill_(num_updates)


def _replicated(optimizer: ZeroOptimizer, parameter: nn.Parameter, kind: str) -> Tensor:
    """Without ZeRO."""
    master = next(master for candidate, master in optimizer.replicated_masters() if candidate is parameter)
    return master.detach() if kind == "weight" else optimizer.torch_optimizer.state[master][kind]


def _fragment(parameter: nn.Parameter, kind: str) -> Tensor:
    """Under ZeRO 1 and 2, of a parameter that this replica has a part of."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return mapping.get_hp_fragment(None if kind == "weight" else kind).detach()


def _write_partition(parameter: nn.Parameter, kind: str, values: Tensor) -> None:
    """Under ZeRO 3, whose partitions are all of one size, with padding in the last."""
    partition = parameter.ds_tensor  # type: ignore[attr-defined]
    padded = nn.functional.pad(values, (0, partition.numel() - values.numel())).to(partition.device)
    if kind == "weight":
        safe_set_local_fp32_param(parameter, padded)
        partition.data.copy_(padded)
    else:
        safe_set_local_optimizer_state(parameter, padded, kind)
