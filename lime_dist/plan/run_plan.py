"""The plan of a run: all that is known before it starts. Pure data, which follows from a checked config alone.

The executor, the transport, the stage table, the picture, preflight, submit and the tests read it; nobody works out a part
of it in another way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from lime_dist.config import Config
from lime_dist.errors import LayoutError
from lime_dist.formats import format_bytes
from lime_dist.layout import Layout
from lime_dist.plan.choice import EdgeChoice
from lime_dist.plan.flops import STEP_FACTOR
from lime_dist.plan.memory import MemoryEstimate, StageMemory
from lime_dist.plan.schedule import eager_warmup, plain_warmup
from lime_dist.plan.shape import BundleShape
from lime_dist.plan.stages import ChunkPlan, StagePlan, plan_chunks, plan_stages, plan_transfer_of
from lime_dist.plan.transfer import TransferPlan


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The whole plan of a run.

    config: checked, and what the plan follows from. warmup: forwards of the first stage before its first backward, None for
    the schedule's own number. stages, memory (of one rank of each): by pipeline rank. choice: where routers or a budget chose
    the edges that the config holds, what they kept; for people, as nothing follows from it.
    """

    config: Config = field(compare=False)  # two may come out as the same plan
    warmup: int | None
    transfer: TransferPlan
    stages: tuple[StagePlan, ...]
    memory: tuple[StageMemory, ...]
    choice: EdgeChoice | None = field(default=None, compare=False)

    @property
    def layout(self) -> Layout:
        return self.config.layout

    @property
    def schedule(self) -> str:
        return self.config.pipeline.schedule

    @property
    def num_microbatches(self) -> int:
        return self.config.num_microbatches

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
    def model_flops_per_token(self) -> int:
        """Of a training step, forward and backward, of all ranks of a replica together (`flops.py`)."""
        return STEP_FACTOR * sum(chunk.flops.total for chunk in self.chunks)

    @property
    def model_flops_per_step(self) -> int:
        """Of all replicas together."""
        return self.model_flops_per_token * self.config.tokens_per_step

    @property
    def boundary_bytes(self) -> list[int]:
        """Of one microbatch over each boundary, forward; with virtual stages the last one leads back to the first stage."""
        sent = [stage.sent_bytes for stage in self.stages]
        return sent if self.virtual_stages > 1 else sent[:-1]


def plan_run(config: Config) -> RunPlan:
    """The plan of a checked config. Raises: PlanError for what does not fit the stages, LayoutError for `run.memory`.

    `pipeline.warmup: auto` takes the most forwards, up to those of eager 1F1B, with which every stage fits `run.memory`.
    """
    transfer = plan_transfer_of(config)
    for plan in _plan_warmups(config, transfer, plan_chunks(config, transfer), _warmups(config)):
        if _fits(plan):
            return plan
    needs = [memory.total_bytes for memory in plan.memory]
    worst = needs.index(max(needs))
    raise LayoutError(
        f"run.memory: {config.run.memory}, but a rank of stage {worst} needs about {format_bytes(needs[worst])}; lower "
        "data.seq_length or data.micro_batch_size (or raise pipeline.num_microbatches), or raise parallel.pp, parallel.tp or run.memory"
    )


def replan_warmups(plan: RunPlan, warmups: Iterable[int | None]) -> Iterator[RunPlan]:
    """The same run with each of them, whether or not it fits `run.memory`."""
    return _plan_warmups(plan.config, plan.transfer, plan.chunks, warmups)


def _plan_warmups(
    config: Config, transfer: TransferPlan, chunks: tuple[ChunkPlan, ...], warmups: Iterable[int | None]
) -> Iterator[RunPlan]:
    """Only the order of passes and what they hold at a time differ."""
    estimate = MemoryEstimate(config, chunks)
    for warmup in warmups:
        stages = plan_stages(config, chunks, warmup)
        yield RunPlan(config=config, warmup=warmup, transfer=transfer, stages=stages, memory=estimate.of(stages))


def _warmups(config: Config) -> list[int | None]:
    """To be tried in this order; None for the schedule's own."""
    pipeline, parallel = config.pipeline, config.parallel
    if pipeline.warmup != "auto":
        return [pipeline.warmup if isinstance(pipeline.warmup, int) else None]
    if pipeline.schedule != "1f1b":
        return [None]
    sizes = {
        "num_stages": parallel.pp,
        "num_microbatches": config.num_microbatches,
        "virtual_stages": parallel.virtual_stages,
    }
    return [*range(eager_warmup(**sizes), plain_warmup(**sizes), -1), None]


def _fits(plan: RunPlan) -> bool:
    allowed = plan.config.run.memory_bytes
    return allowed is None or all(memory.total_bytes <= allowed for memory in plan.memory)
