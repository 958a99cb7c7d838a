"""What is compared, and over how fast a link: configs, planned bytes and rates. Pure data, no ranks, no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from lime_dist.config import Config, check_config, parse_config
from lime_dist.config.reading import nearest
from lime_dist.errors import ConfigError, LayoutError, shown
from lime_dist.plan.run_plan import RunPlan, plan_run

# Wide enough for routing to be as small a share of the computation as in the paper's models: at a hidden size of 256
# and 256 tokens it is 10 % of a LLaMA step, here 1 %. Untied, so that nothing but what the plan says travels in a step.
_BASE: Mapping[str, Any] = {
    "model": {
        "num_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_heads": 8,
        "num_kv_heads": 4,
        "vocab_size": 512,
        "tie_embeddings": False,
    },
    "parallel": {"pp": 4},
    "pipeline": {"num_microbatches": 16},
    "optim": {"lr_schedule": "constant", "warmup_steps": 0},
    "data": {"seq_length": 128, "global_batch_size": 16},
    "run": {"device": "cpu", "timeout_seconds": 300},
}
_QUICK = (
    "model.hidden_size=256",
    "model.intermediate_size=704",
    "pipeline.num_microbatches=8",
    "data.global_batch_size=8",
)


class Pipeline(Enum):
    """Whose executor and messages: ours, or the growing tuple through another's."""

    OWN = "lime_dist"
    TORCH = "torch"
    DEEPSPEED = "DeepSpeed"


LLAMA, LEAST = "LLaMA", "least"
PLAIN = "1F1B"
_MODELS = {
    LLAMA: ("depth.router=none",),
    "relay": ("depth.policy=relay",),
    LEAST: ("depth.policy=least",),
    "first:2": ("depth.pattern=first:2",),
}


_SCHEDULES = {
    PLAIN: (),
    "1F1B, warmup auto": ("pipeline.warmup=auto",),
    "v=2": ("parallel.virtual_stages=2",),
    "v=2, warmup auto": ("parallel.virtual_stages=2", "pipeline.warmup=auto"),
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """config: checked. model, schedule: what it is called in the report."""

    model: str
    schedule: str
    config: Config
    pipeline: Pipeline = Pipeline.OWN

    @property
    def name(self) -> str:
        return f"{self.model}, {self.schedule}"

    @property
    def twin(self) -> tuple[str, str]:
        """Model and schedule of the way that it is compared with."""
        return LLAMA, self.schedule

    @property
    def first_loss_of(self) -> tuple[str, str]:
        """Ways for which this is equal are the same model, so their first losses are, too."""
        return self.config.depth.router, self.config.depth.name

    @cached_property
    def plan(self) -> RunPlan:
        return plan_run(self.config)

    @property
    def card_bytes(self) -> list[int]:
        """What each host's network card is to send in a step, and as much to receive: bundles and their gradients."""
        plan = self.plan
        return [plan.num_microbatches * (stage.sent_bytes + stage.received_bytes) for stage in plan.stages]


def make_ways(overrides: Sequence[str] = (), *, quick: bool = False, models: Collection[str] = ()) -> list[Way]:
    """All of them, or those of `models`, LLaMA's and the full pattern's; references are called by their pipeline.

    A schedule that comes out as an earlier one, as `warmup: auto` can, is left out.
    Raises: ConfigError, LayoutError.
    """
    overrides = (*(_QUICK if quick else ()), *overrides)
    base = _config(overrides)
    _check_layout(base)
    ways = [
        Way(model=model, schedule=schedule, config=_config((*overrides, *of_model, *of_schedule)))
        for schedule, of_schedule in _SCHEDULES.items()
        for model, of_model in _MODELS.items()
    ]
    ways = [way for index, way in enumerate(ways) if not any(_same_passes(way, other) for other in ways[:index])]
    relay = _config((*overrides, *_MODELS["relay"]))
    ways += [
        Way(model=pipeline.value, schedule=PLAIN, config=relay, pipeline=pipeline)
        for pipeline in (Pipeline.TORCH, Pipeline.DEEPSPEED)
    ]
    _check_models(models, ways)
    return [way for way in ways if not models or way.model in (LLAMA, LEAST, *models)]


def _same_passes(way: Way, other: Way) -> bool:
    return way.model == other.model and way.plan.stages == other.plan.stages


def _config(overrides: Sequence[str]) -> Config:
    config = parse_config(dict(_BASE), overrides)
    return check_config(config, config.layout.world_size)


def _check_layout(config: Config) -> None:
    layout = config.layout
    if layout.tp > 1 or layout.dp > 1 or layout.pp < 2:
        raise LayoutError(
            f"parallel: {layout} does not fit hosts of one stage each; leave tp and dp at 1 and set parallel.pp to 2 or more"
        )


def _check_models(models: Collection[str], ways: Sequence[Way]) -> None:
    known = list(dict.fromkeys(way.model for way in ways))
    for model in models:
        if model not in known:
            raise ConfigError(f"--models: {shown(model)} is unknown{nearest(model, known)}")


def limited_rate(ways: Sequence[Way], llama_seconds: float, share: float) -> float:
    """Bytes a second each way, at which the busiest card of the full pattern's plan carries its step in `share` x LLaMA's."""
    full = next(way for way in ways if way.model == LEAST and way.schedule == PLAIN)
    return max(full.card_bytes) / (share * llama_seconds)
