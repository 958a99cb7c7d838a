"""DeepSpeed: ZeRO's optimiser over the stage module. Nothing else imports it.

Below ZeRO 2 the stage is differentiated without the engine, as pipeline stages need, and the engine only
reduces and steps. From ZeRO 2 on (one stage only) passes go through the engine, whose hooks reduce
gradients as they come.

The host waits for the device nowhere in a step made of this: DeepSpeed's own norm and its checks, which read the
device several times each, are off, and the norm is taken and clipped by here. They cannot be turned off under ZeRO 3 and
with an offloaded optimiser: there DeepSpeed reads its norm once more (`is_invalid_grad_norm` in its `step`), marks
one that is not finite by a constant copied from the host, once for each group of parameters, and reads the norm of each
offloaded gradient, twice as that norm is taken here too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from lime_dist.backends import DEEPSPEED_LOGGER, is_error
from lime_dist.backends.megatron import DeepSpeedMpu, Groups
from lime_dist.config import Config
from lime_dist.lime.model import LimeStage
from lime_dist.lime.values import specified_parameters
from lime_dist.pipeline.executor import joint_backward
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.tensors import MOMENTS, Role
from lime_dist.training.optim import build_optimizer, set_lr

# Else the first start on a CPU compiles a shared-memory all-reduce, which needs a compiler and half a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_CLIP_EPS = 1e-6  # DeepSpeed's, and torch's


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The user's `deepspeed:` keys with ours on top. The step is the only accumulation that DeepSpeed sees."""
    zero = {"stage": config.zero_stage, **config.deepspeed.get("zero_optimization", {})}
    if config.zero_stage < 2:
        zero["overlap_comm"] = False  # gradients are handed over once a step
        zero["contiguous_gradients"] = False
    elif config.zero_stage == 2 and config.run.dtype == "bf16" and config.layout.dp.bit_count() > 1:
        # Else DeepSpeed divides by the number of replicas in bf16 before it sums: exact for powers of two only.
        zero["contiguous_gradients"] = False
    takes_norm = deepspeed_takes_norm(config)
    if config.zero_stage in (1, 2):
        zero["compute_grad_norm"] = takes_norm
    return {
        "zero_force_ds_cpu_optimizer": False,  # else offloading asks for DeepSpeed's own AdamW; ours is torch's
        **config.deepspeed,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": config.data.global_batch_size // config.layout.dp,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": config.zero_stage >= 2,  # below, passes do not go through the engine
        "gradient_clipping": config.optim.max_grad_norm if takes_norm else 0.0,
        "bf16": {"enabled": config.run.dtype == "bf16", "check_grad_overflow": takes_norm},
        # From ZeRO 2 on the engine sums the microbatches; below, `_add_in_fp32` does.
        **({"data_types": {"grad_accum_dtype": "fp32"}} if config.zero_stage >= 2 else {}),
        # In bf16 a sum over many replicas loses the small gradients; the key may be set to bf16 to halve the traffic.
        "communication_data_type": config.deepspeed.get("communication_data_type", "fp32"),
        "zero_allow_untested_optimizer": True,
    }


def deepspeed_takes_norm(config: Config) -> bool:
    """Whether DeepSpeed takes the gradient's norm and clips by it, as it must under ZeRO 3 and for gradients on the CPU."""
    return config.zero_stage == 3 or _offloads(config)


def _offloads(config: Config) -> bool:
    zero = config.deepspeed.get("zero_optimization", {})
    keys = ("cpu_offload", "offload_optimizer", "zenflow")
    return config.zero_stage > 0 and any(bool(zero.get(key)) for key in keys)


def tell_device(device: torch.device) -> None:
    """DeepSpeed takes the device from LOCAL_RANK, which srun does not set and which misleads where a task sees one GPU."""
    os.environ["LOCAL_RANK"] = str(device.index) if device.type == "cuda" else os.environ.get("LOCAL_RANK", "0")
    if device.type == "cpu":  # else it takes a GPU wherever there is one
        set_accelerator(CPU_Accelerator())


class ZeroOptimizer:
    """Gradients to weights: reduction over the replicas, clipping over the whole model, AdamW.

    A step is: passes through `call` and `backward`, then `finish_gradients`, `take_norm`, and `update`, or `drop_gradients`
    where that is to make no update. In bf16 runs the gradients are summed in fp32 throughout: over microbatches, over the two
    ends of a tied embedding and over the replicas. Collective: these three and `gradient`, over all ranks.
    """

    def __init__(self, stage: LimeStage, config: Config, groups: Groups, device: torch.device):
        self._stage, self._config, self._groups = stage, config, groups
        self.zero_stage, self.device = config.zero_stage, device
        self.dp_rank, self.dp_size, self.dp_group = groups.coordinate.dp_rank, groups.layout.dp, groups.dp
        self._through_engine = config.zero_stage >= 2
        self._placeholder = _router_placeholder(stage, config)
        _mark_for_norm(stage, groups.coordinate.tp_rank)
        tell_device(device)
        if "log_level" in config.deepspeed:  # asked for, by `comms_logger` for one, which writes what it saw there
            DEEPSPEED_LOGGER.removeFilter(is_error)
        self.engine, *_ = deepspeed.initialize(
            model=stage,
            optimizer=build_optimizer(stage, config, placeholder=self._placeholder),
            config=deepspeed_config(config),
            mpu=DeepSpeedMpu(groups),
            dist_init_required=False,
        )
        self.engine.enable_backward_allreduce = self._through_engine  # below, `take_norm` reduces
        self._clip_factor: Tensor | None = None
        self.torch_optimizer.register_step_pre_hook(self._clip_partitions)
        self._create_moments()
        self._microbatches_done = 0
        self._fp32_sums: dict[nn.Parameter, Tensor] = {}
        if config.run.dtype == "bf16" and not self._through_engine:
            for parameter in stage.parameters():
                parameter.register_post_accumulate_grad_hook(self._add_in_fp32)

    @property
    def torch_optimizer(self) -> torch.optim.AdamW:
        """AdamW itself, inside whatever DeepSpeed put around it."""
        wrapped = self.engine.optimizer
        return cast(torch.optim.AdamW, wrapped if isinstance(wrapped, torch.optim.Optimizer) else wrapped.optimizer)

    @property
    def masters(self) -> list[Tensor]:
        """The fp32 tensors that AdamW updates: parameters, or this replica's flat shares of them."""
        if self.zero_stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self.torch_optimizer.param_groups for tensor in group["params"]]

    def _create_moments(self) -> None:
        # What AdamW does in its first update. DeepSpeed links moments to parameters after the first group's
        # first update, when those of the other groups do not exist yet, so they are made before.
        for master in self.masters:
            moments = {kind: torch.zeros_like(master.data) for kind in MOMENTS}
            self.torch_optimizer.state[master] = {"step": torch.tensor(0.0), **moments}
        if self.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    @property
    def call(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What runs the stage's forward."""
        return self.engine if self._through_engine else self._stage

    def backward(self, roots: list[Tensor], gradients: list[Tensor | None]) -> None:
        if not self._through_engine:
            joint_backward(roots, gradients)
            return
        self._microbatches_done += 1
        is_last = self._microbatches_done == self._config.num_microbatches
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(roots[0])

    def _add_in_fp32(self, parameter: nn.Parameter) -> None:
        """Microbatches are summed in fp32: in bf16 a sum of many loses the small ones."""
        assert parameter.grad is not None  # torch calls this when it has one
        if parameter in self._fp32_sums:
            self._fp32_sums[parameter].add_(parameter.grad)
        else:
            self._fp32_sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def finish_gradients(self) -> None:
        """Complete this replica's gradients after its last microbatch: the tied embedding is summed over both ends."""
        self._microbatches_done = 0
        if self._placeholder is not None:
            self._placeholder.grad = torch.zeros_like(self._placeholder)
        if self._config.model.tie_embeddings and self._config.parallel.pp > 1 and self._groups.embedding is not None:
            (tied,) = (
                parameter for spec, parameter in specified_parameters(self._stage) if spec.role is Role.EMBEDDING
            )
            dist.all_reduce(self._local_gradient(tied), group=self._groups.embedding)

    def _local_gradient(self, parameter: nn.Parameter) -> Tensor:
        """This replica's sum over the microbatches: fp32 in bf16 runs too, unless the engine has it."""
        if parameter in self._fp32_sums:
            return self._fp32_sums[parameter]
        assert parameter.grad is not None  # after a backward pass
        return parameter.grad

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient of `parameter` averaged over the replicas, fp32; between `finish_gradients` and `take_norm`."""
        if self._through_engine:
            return safe_get_full_grad(parameter)
        gradient = self._local_gradient(parameter).float().clone()
        dist.all_reduce(gradient, group=self._groups.dp)
        return gradient / self._groups.layout.dp

    def take_norm(self) -> Tensor:
        """Average the gradients over the replicas; returns their norm over the whole model, before clipping.

        0-dim, on the device, the same on all ranks; infinite or NaN when some gradient is.
        """
        if self.zero_stage == 0:
            return self._norm_of_replicated()
        if self.zero_stage == 1:
            self._hand_over_gradients()
            self.engine.optimizer.reduce_gradients()
        return self._norm_of_offloaded() if _offloads(self._config) else self._norm_of_partitions()

    def _norm_of_offloaded(self) -> Tensor:
        wrapped = self.engine.optimizer
        if self.zero_stage < 3:
            return wrapped.scaled_global_norm()
        return combine_grad_norm_groups(wrapped._get_norm_groups())

    def _norm_of_replicated(self) -> Tensor:
        gradients = {
            parameter: self._local_gradient(parameter)
            for parameter in self._stage.parameters()
            if self._has_gradient(parameter)
        }
        for gradient in gradients.values():
            dist.all_reduce(gradient.div_(self._groups.layout.dp), group=self._groups.dp)
        counted = [gradient for parameter, gradient in gradients.items() if _counts_in_norm(parameter)]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in counted]
        squares = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
        dist.all_reduce(squares, group=self._groups.model)
        return squares.sqrt()

    def _norm_of_partitions(self) -> Tensor:
        """Bit for bit as DeepSpeed's `get_grad_norm_direct`, which however waits for the device."""
        wrapped, groups = self.engine.optimizer, []
        dtype = torch.float64 if self.zero_stage == 3 else torch.float32
        for index, parameters in enumerate(
            wrapped.fp16_groups if self.zero_stage == 3 else wrapped.params_in_partition
        ):
            gradients = (
                part for part in wrapped.averaged_gradients[index] if not getattr(part, "_zero_padding", False)
            )
            norms = [
                torch.linalg.vector_norm(gradient, dtype=torch.float64)
                for gradient, parameter in zip(gradients, parameters, strict=False)
                if _counts_in_norm(parameter)
            ]
            square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.device)
            square = square.to(dtype)
            dist.all_reduce(square, group=self._groups.dp)
            dist.all_reduce(square, group=self._groups.model)
            groups.append(square.sqrt())
        return torch.linalg.vector_norm(torch.stack(groups))

    def update(self, norm: Tensor, lr_factor: float) -> None:
        """Clip by `norm`, which `take_norm` gave, and update the weights."""
        set_lr(self.engine.optimizer, lr_factor)
        if self.zero_stage == 0:
            self._update_replicated(norm)
            return
        if self._config.optim.max_grad_norm and not deepspeed_takes_norm(self._config):
            self._clip_factor = 1 / ((norm + _CLIP_EPS) / self._config.optim.max_grad_norm).clamp(min=1)
        self.engine.step()

    def drop_gradients(self) -> None:
        """Instead of `update`: the step changes nothing, and the next one begins without gradients.

        Under ZeRO what DeepSpeed does with a step that overflows in fp16.
        """
        self._fp32_sums.clear()
        if self.zero_stage == 0:
            self._stage.zero_grad()
            return
        wrapped = self.engine.optimizer
        if self.zero_stage == 3:
            wrapped._pre_step()
            wrapped._partition_all_parameters()
            wrapped._overflow_clean_up(wrapped.loss_scale)
            return
        wrapped.zero_grad()
        # Else the next gradients are added to these, where they are offloaded.
        wrapped.micro_step_id = INITIAL_MICRO_STEP_ID
        if _offloads(self._config):
            wrapped._offload_accumulated_param_ids = set()
            wrapped.reset_cpu_buffers()
        for group in wrapped.averaged_gradients:
            wrapped.averaged_gradients[group] = wrapped.all_grad_tensors[group] = None

    def _hand_over_gradients(self) -> None:
        """Give the fp32 sums to the parameters, in whose dtype DeepSpeed takes gradients."""
        for parameter, gradient in self._fp32_sums.items():
            parameter.grad = gradient.to(parameter.dtype)
        self._fp32_sums.clear()

    def _clip_partitions(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Ahead of AdamW, in whose hands DeepSpeed has put this replica's share of a group's gradients, in fp32."""
        if self._clip_factor is not None:
            for master in (master for group in optimizer.param_groups for master in group["params"]):
                master.grad.mul_(self._clip_factor)

    def _update_replicated(self, norm: Tensor) -> None:
        """Without DeepSpeed, which in bf16 would look for numbers that are not finite in one gradient after the other."""
        self._hand_over_gradients()
        if self._config.optim.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(self._stage.parameters(), self._config.optim.max_grad_norm, norm)
        copies = [(parameter, master) for parameter, master in self.replicated_masters() if parameter is not master]
        for parameter, master in copies:
            master.grad = torch.zeros_like(master) if parameter.grad is None else parameter.grad.to(master.dtype)
        self.torch_optimizer.step()
        for parameter, master in copies:
            parameter.data.copy_(master.data)
            master.grad = None
        self._stage.zero_grad()

    def replicated_masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Without ZeRO: parameters and what AdamW updates for each, itself in fp32 and DeepSpeed's fp32 copy in bf16."""
        wrapped = self.engine.optimizer
        if isinstance(wrapped, torch.optim.Optimizer):
            yield from ((parameter, parameter) for parameter in self._stage.parameters())
            return
        for parameters, masters in zip(wrapped.fp16_groups, wrapped.fp32_groups, strict=True):
            yield from zip(parameters, masters, strict=True)

    def _has_gradient(self, parameter: nn.Parameter) -> bool:
        return parameter in self._fp32_sums or parameter.grad is not None


def _router_placeholder(stage: LimeStage, config: Config) -> nn.Parameter | None:
    """DeepSpeed's norm is a collective per parameter group, so a stage without routers joins with an empty hand."""
    tensors = logical_tensors(config.model, config.pattern).values()
    if any(spec.role is Role.ROUTER for spec in stage.parameter_specs()) or not any(
        tensor.role is Role.ROUTER for tensor in tensors
    ):
        return None
    some = next(stage.parameters())
    placeholder = nn.Parameter(torch.zeros(1, dtype=some.dtype, device=some.device))
    stage.register_parameter("no_router", placeholder)
    return placeholder


def _counts_in_norm(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "model_parallel", False)


def _mark_for_norm(stage: LimeStage, tp_rank: int) -> None:
    """Have each value counted once in the norm, by DeepSpeed too: what it takes for model-parallel is counted on every rank."""
    for spec, parameter in specified_parameters(stage):
        parameter.model_parallel = not spec.tied_copy and (spec.sharded or tp_rank == 0)  # type: ignore[attr-defined]
