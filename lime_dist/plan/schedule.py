"""Pipeline schedules: for each stage the order of its forward and backward passes. Pure data.

The orders are those of `torch.distributed.pipelining` (Schedule1F1B, ScheduleInterleaved1F1B, ScheduleGPipe,
ScheduleLoopedBFS), which a test compares them with; they are written out here so that planning needs no torch.
With `virtual_stages` v, stage r of P runs the chunks r, r + P, r + 2P, ..., v of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, count

from lime_dist.errors import ConfigError, shown


class Kind(Enum):
    FORWARD = "F"
    BACKWARD = "B"


# What a pass of each kind adds to the microbatches whose activations are held.
_ADDS_IN_FLIGHT = {Kind.FORWARD: 1, Kind.BACKWARD: -1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One pass of one microbatch through one chunk, which is numbered in the order of the model."""

    kind: Kind
    chunk: int
    microbatch_index: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind.value}{self.microbatch_index}"


@dataclass(frozen=True, kw_only=True)
class _Pipeline:
    num_stages: int
    num_microbatches: int
    virtual_stages: int = 1

    @property
    def num_rounds(self) -> int:
        """Of microbatches: a stage runs a round through one of its chunks after another, as torch does."""
        return max(1, self.num_microbatches // self.num_stages)

    @property
    def microbatches_per_round(self) -> int:
        """The number where rounds are equal."""
        return self.num_microbatches // self.num_rounds

    @property
    def rounds(self) -> list[range]:
        """The first have a microbatch more where rounds cannot be equal; none is smaller than the pipeline if it can be."""
        size, rest = divmod(self.num_microbatches, self.num_rounds)
        ends = [*accumulate(size + (index < rest) for index in range(self.num_rounds))]
        return [range(start, end) for start, end in zip([0, *ends], ends)]

    def chunks(self, stage_index: int) -> range:
        return range(stage_index, self.num_stages * self.virtual_stages, self.num_stages)

    def plain_warmup(self, stage_index: int) -> int:
        """Forwards before the first backward, of which a stage runs no more than it has."""
        return self.num_stages - stage_index if self.virtual_stages == 1 else self.eager_warmup(stage_index)

    def eager_warmup(self, stage_index: int) -> int:
        """As `plain_warmup`, with two forwards more for each stage to come, and so a pass of slack for each transfer."""
        return (self.virtual_stages - 1) * self.microbatches_per_round + 2 * (self.num_stages - stage_index) - 1

    def warmup(self, stage_index: int, on_first_stage: int | None) -> int:
        """As `plain_warmup`, where the first stage runs `on_first_stage` (None: as many as in the plain order)."""
        plain = self.plain_warmup(stage_index)
        if on_first_stage is None:
            return plain
        raised = plain + on_first_stage - self.plain_warmup(0)
        return min(raised, self.eager_warmup(stage_index)) if self.virtual_stages == 1 else raised


def _passes(kind: Kind, rounds: Iterable[Sequence[int]], chunks: Sequence[int]) -> list[Action]:
    return [
        Action(kind=kind, chunk=chunk, microbatch_index=index)
        for microbatches in rounds
        for chunk in chunks
        for index in microbatches
    ]


def _gpipe(pipeline: _Pipeline, stage_index: int, warmup: int | None) -> list[Action]:
    """All forwards before all backwards; with virtual stages breadth-first (Lamy-Poirier 2022, arXiv 2211.05953).

    The backwards of torch's ScheduleGPipe begin with the first microbatch, those of its ScheduleLoopedBFS with the last.
    """
    microbatches, chunks = range(pipeline.num_microbatches), pipeline.chunks(stage_index)
    back = microbatches if pipeline.virtual_stages == 1 else microbatches[::-1]
    return _passes(Kind.FORWARD, [microbatches], chunks) + _passes(Kind.BACKWARD, [back], chunks[::-1])


def _one_forward_one_backward(pipeline: _Pipeline, stage_index: int, warmup: int | None) -> list[Action]:
    """PipeDream-flush, and interleaved 1F1B with virtual stages (Narayanan et al. 2021, section 2.2)."""
    rounds, chunks = pipeline.rounds, pipeline.chunks(stage_index)
    forwards, backwards = _passes(Kind.FORWARD, rounds, chunks), _passes(Kind.BACKWARD, rounds, chunks[::-1])
    first = min(len(forwards), pipeline.warmup(stage_index, warmup))
    steady = [action for pair in zip(backwards, forwards[first:]) for action in pair]
    return forwards[:first] + steady + backwards[len(forwards) - first :]


_SCHEDULES: dict[str, Callable[[_Pipeline, int, int | None], list[Action]]] = {
    "1f1b": _one_forward_one_backward,
    "gpipe": _gpipe,
}
SCHEDULE_NAMES = tuple(_SCHEDULES)


def plan_schedule(
    name: str,
    *,
    stage_index: int,
    num_stages: int,
    num_microbatches: int,
    virtual_stages: int = 1,
    warmup: int | None = None,
) -> list[Action]:
    """The actions of one stage in order.

    warmup: forwards of the first stage before its first backward; None for the plain order. Up to
    `eager_warmup`, eager 1F1B (arXiv 2211.05322), later stages run one more for each more of the first.
    Raises: ConfigError as `check_schedule`.
    """
    check_schedule(
        name,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        virtual_stages=virtual_stages,
        warmup=warmup,
    )
    pipeline = _Pipeline(num_stages=num_stages, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    return _SCHEDULES[name](pipeline, stage_index, warmup)


def check_schedule(
    name: str, *, num_stages: int, num_microbatches: int, virtual_stages: int = 1, warmup: int | None = None
) -> None:
    """Raises: ConfigError for an unknown name, and for microbatches or a warm-up that the schedule cannot take."""
    if name not in _SCHEDULES:
        raise ConfigError(f"pipeline.schedule: {shown(name)} is unknown; use one of {', '.join(SCHEDULE_NAMES)}")
    pipeline = _Pipeline(num_stages=num_stages, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    if name == "1f1b" and virtual_stages > 1:
        _check_rounds(pipeline)
    if warmup is None:
        return
    if name != "1f1b":
        raise ConfigError(f"pipeline.warmup: {name} has none to set; remove it, or set pipeline.schedule=1f1b")
    _check_warmup(pipeline, warmup)


def _check_rounds(pipeline: _Pipeline) -> None:
    number, stages = pipeline.num_microbatches, pipeline.num_stages

    def fits(number: int) -> bool:
        return number % max(1, number // stages) == 0

    if fits(number):
        return
    # There is one below: the largest multiple of the stages.
    below = next(other for other in count(number - 1, -1) if fits(other))
    above = next(other for other in count(number + 1) if fits(other))
    raise ConfigError(
        f"pipeline.num_microbatches: {number} cannot be split into {pipeline.num_rounds} equal rounds, "
        f"as parallel.virtual_stages={pipeline.virtual_stages} over {stages} stages asks; use {below} or {above}"
    )


def _check_warmup(pipeline: _Pipeline, warmup: int) -> None:
    lowest = pipeline.plain_warmup(0)
    highest = pipeline.eager_warmup(0) if pipeline.virtual_stages == 1 else None
    if warmup < lowest or (highest is not None and warmup > highest):
        fitting = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"
        raise ConfigError(f"pipeline.warmup: {warmup} does not fit {pipeline.num_stages} stages; use {fitting}")


def plain_warmup(*, num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> int:
    """The least `warmup` of 1f1b, which is that of its plain order; a stage runs no more forwards than it has."""
    pipeline = _Pipeline(num_stages=num_stages, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    return pipeline.plain_warmup(0)


def eager_warmup(*, num_stages: int, num_microbatches: int, virtual_stages: int = 1) -> int:
    """The least `warmup` of 1f1b that gives each transfer of its steady state, both ways, the time of one pass.

    With virtual stages this is the plain order's: there two stages that are neighbours already differ by two.
    """
    pipeline = _Pipeline(num_stages=num_stages, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    return pipeline.eager_warmup(0)


def plan_forward_only(
    num_microbatches: int, *, stage_index: int = 0, num_stages: int = 1, virtual_stages: int = 1
) -> list[Action]:
    """Evaluation: every microbatch forward, nothing back, in the order of interleaved 1F1B, for any number of them."""
    pipeline = _Pipeline(num_stages=num_stages, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    return _passes(Kind.FORWARD, pipeline.rounds, pipeline.chunks(stage_index))


def peak_in_flight(actions: Iterable[Action]) -> int:
    """The largest number of (chunk, microbatch) pairs whose activations a stage holds at once."""
    return max(accumulate(_ADDS_IN_FLIGHT[action.kind] for action in actions), default=0)


def in_flight_counts(actions: Iterable[Action]) -> Iterator[Counter[int]]:
    """After each action, for each chunk with any, the number of microbatches whose activations it holds."""
    held: Counter[int] = Counter()
    for action in actions:
        held[action.chunk] += _ADDS_IN_FLIGHT[action.kind]
        yield +held
