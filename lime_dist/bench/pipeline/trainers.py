"""What the bench times, each on one rank of a pipeline: our own step, and the growing tuple through two other pipelines."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from lime_dist.backends.deepspeed_pipeline import DeepSpeedPipeline
from lime_dist.backends.megatron import Groups, MegatronParts
from lime_dist.bench.pipeline.growing_tuple import TupleStage
from lime_dist.config import Config
from lime_dist.lime.values import initialize
from lime_dist.plan.run_plan import plan_run
from lime_dist.training.optim import build_optimizer
from lime_dist.training.rank import TORCH_DTYPES, Rank


class Trainer(Protocol):
    def step(self, batch: Tensor) -> float:
        """One update from token ids [global batch, seq + 1]; returns the mean loss. Collective: world."""


class OwnTrainer:
    def __init__(self, config: Config, groups: Groups, device: torch.device):
        self._rank = Rank(plan_run(config), groups, device)

    def step(self, batch: Tensor) -> float:
        return self._rank.train_step(batch, lr_factor=1.0).loss


class TorchTupleTrainer:
    """The growing tuple over `PipelineStage` and `Schedule1F1B`."""

    def __init__(self, config: Config, groups: Groups, device: torch.device):
        self._stage = _tuple_stage(config, groups.coordinate.pp_rank, groups, device)
        self._optimizer = build_optimizer(self._stage.chunk, config)
        pipeline = PipelineStage(
            self._stage, groups.coordinate.pp_rank, groups.layout.pp, device, group=groups.pp_forward
        )
        self._schedule = Schedule1F1B(pipeline, config.num_microbatches, self._stage.loss)
        self._last_rank = groups.layout.pp - 1

    def step(self, batch: Tensor) -> float:
        losses: list[Tensor] = []
        inputs = (batch[:, :-1],) if self._stage.chunk.is_first else ()
        targets = batch[:, 1:] if self._stage.chunk.is_last else None
        self._schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        self._optimizer.step()
        self._optimizer.zero_grad()
        loss = torch.stack(losses).detach().mean() if losses else torch.zeros(())
        dist.broadcast(loss, self._last_rank)
        return float(loss)


class DeepSpeedTupleTrainer:
    """The growing tuple through DeepSpeed's PipelineModule."""

    def __init__(self, config: Config, groups: Groups, device: torch.device):
        stages = [partial(_tuple_stage, config, index, groups, device) for index in range(groups.layout.pp)]
        parts = _parts(config, groups, device)
        self._microbatch_size = config.microbatch_size
        self._pipeline = DeepSpeedPipeline(
            stages,
            lambda logits, targets: parts.cross_entropy(logits, targets.flatten()).mean(),
            lambda stage: build_optimizer(stage.chunk, config),  # type: ignore[arg-type]
            num_microbatches=config.num_microbatches,
            device=device,
        )

    def step(self, batch: Tensor) -> float:
        return self._pipeline.step((rows[:, :-1], rows[:, 1:]) for rows in batch.split(self._microbatch_size))


def _tuple_stage(config: Config, stage_index: int, groups: Groups, device: torch.device) -> TupleStage:
    stage = TupleStage(config, stage_index, _parts(config, groups, device))
    initialize(stage.chunk, config.run.seed)
    return stage


def _parts(config: Config, groups: Groups, device: torch.device) -> MegatronParts:
    return MegatronParts(groups, sequence_parallel=False, dtype=TORCH_DTYPES[config.run.dtype], device=device)
