"""The plan of a run: all that is known before it starts. Pure data, made once from a checked config.

The executor, the transport, the stage table, the picture, preflight, submit and the tests read it; nobody computes a part of
it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lime_dist.config import Config
from lime_dist.layout import Layout
from lime_dist.plan.memory import StageMemory, estimate_memory
from lime_dist.plan.shape import BundleShape
from lime_dist.plan.stages import ChunkPlan, StagePlan, plan_stages, plan_transfer_of
from lime_dist.plan.transfer import TransferPlan


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The whole plan of a run. stages, memory (of one rank of each): by pipeline rank."""

    layout: Layout
    schedule: str
    num_microbatches: int
    transfer: TransferPlan
    stages: tuple[StagePlan, ...]
    memory: tuple[StageMemory, ...]

    @property
    def virtual_stages(self) -> int:
        return len(self.stages[0].chunks)

    @property
    def shape(self) -> BundleShape:
        return self.stages[0].chunks[0].shape

    @cached_property
    def chunks(self) -> tuple[ChunkPlan, ...]:
        """In model order."""
        return tuple(sorted((chunk for stage in self.stages for chunk in stage.chunks), key=lambda chunk: chunk.chunk))

    @property
    def boundary_bytes(self) -> list[int]:
        """Of one microbatch over each boundary, forward; with virtual stages the last one leads back to the first stage."""
        sent = [stage.sent_bytes for stage in self.stages]
        return sent if self.virtual_stages > 1 else sent[:-1]


def plan_run(config: Config) -> RunPlan:
    """The plan of a checked config. Raises: PlanError, ConfigError for what does not fit the stages."""
    transfer = plan_transfer_of(config)
    stages = plan_stages(config, transfer)
    return RunPlan(
        layout=config.layout,
        schedule=config.pipeline.schedule,
        num_microbatches=config.pipeline.num_microbatches,
        transfer=transfer,
        stages=stages,
        memory=estimate_memory(config, stages),
    )
