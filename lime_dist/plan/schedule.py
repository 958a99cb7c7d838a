"""Pipeline schedules: for each stage the order of its forward and backward passes. Pure data.

The orders are those of `torch.distributed.pipelining` (Schedule1F1B, ScheduleGPipe), which a test
compares them with; they are written out here so that planning needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from lime_dist.errors import ConfigError, shown


class Kind(Enum):
    FORWARD = "F"
    BACKWARD = "B"


@dataclass(frozen=True)
class Action:
    """One pass of one microbatch through one stage."""

    kind: Kind
    microbatch_index: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch_index}"


@lru_cache(maxsize=4)  # all stages have the same
def _passes(kind: Kind, count: int) -> tuple[Action, ...]:
    return tuple(Action(kind, index) for index in range(count))


def _forwards(count: int) -> list[Action]:
    return list(_passes(Kind.FORWARD, count))


def _backwards(count: int) -> list[Action]:
    return list(_passes(Kind.BACKWARD, count))


def _gpipe(stage_index: int, num_stages: int, num_microbatches: int) -> list[Action]:
    return _forwards(num_microbatches) + _backwards(num_microbatches)


def _one_forward_one_backward(stage_index: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """PipeDream-flush (Narayanan et al. 2021, section 2.2): at most num_stages - stage_index microbatches in flight."""
    warmup = min(num_microbatches, num_stages - stage_index)
    forwards, backwards = _forwards(num_microbatches), _backwards(num_microbatches)
    steady = [action for pair in zip(backwards, forwards[warmup:]) for action in pair]
    return forwards[:warmup] + steady + backwards[num_microbatches - warmup :]


_SCHEDULES = {"1f1b": _one_forward_one_backward, "gpipe": _gpipe}
SCHEDULE_NAMES = tuple(_SCHEDULES)


def plan_schedule(name: str, *, stage_index: int, num_stages: int, num_microbatches: int) -> list[Action]:
    """The actions of one stage in order. Raises: ConfigError for an unknown name."""
    if name not in _SCHEDULES:
        raise ConfigError(f"pipeline.schedule: {shown(name)} is unknown; use one of {', '.join(SCHEDULE_NAMES)}")
    return _SCHEDULES[name](stage_index, num_stages, num_microbatches)


def plan_forward_only(num_microbatches: int) -> list[Action]:
    """Evaluation: every microbatch forward, nothing back."""
    return _forwards(num_microbatches)


def peak_in_flight(actions: list[Action]) -> int:
    """The largest number of microbatches whose activations a stage holds at once."""
    held = peak = 0
    for action in actions:
        held += 1 if action.kind is Kind.FORWARD else -1
        peak = max(peak, held)
    return peak
