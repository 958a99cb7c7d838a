"""DeepSpeed's own pipeline, PipelineModule and its engine: what ours is compared with. Ours does not use it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

from lime_dist.backends.deepspeed import tell_device


class _OneArgument(nn.Module):
    """Its layers hand on one thing: a tensor, or a tuple of tensors, which all need gradients."""

    def __init__(self, build: Callable[[], nn.Module]):
        super().__init__()
        self.stage = build()

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Any:
        return self.stage(*inputs) if isinstance(inputs, tuple) else self.stage(inputs)


class DeepSpeedPipeline:
    """1F1B over all ranks, a stage each. Collective: the constructor and `step`, over all ranks.

    stages: what builds each stage, which takes and returns a tensor or several. optimizer: made of this rank's own stage.
    """

    def __init__(
        self,
        stages: Sequence[Callable[[], nn.Module]],
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        num_microbatches: int,
        device: torch.device,
    ):
        tell_device(device)
        with redirect_stdout(io.StringIO()):  # it prints its partition
            module = PipelineModule(
                [LayerSpec(_OneArgument, build) for build in stages],
                num_stages=len(stages),
                loss_fn=loss,
                partition_method="uniform",
            )
        (own,) = module.forward_funcs
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer(own.stage),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": num_microbatches,
                "steps_per_print": None,
            },
            dist_init_required=False,
        )

    def step(self, microbatches: Iterator[tuple[Tensor, Tensor]]) -> float:
        """One update from (inputs, targets) of each microbatch; returns their mean loss."""
        return float(self._engine.train_batch(microbatches))
