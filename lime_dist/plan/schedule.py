"""Pipeline schedules: for each stage the order of its forward and backward passes. Pure data.

The orders are those of `torch.distributed.pipelining` (Schedule1F1B, ScheduleInterleaved1F1B, ScheduleGPipe,
ScheduleLoopedBFS), which a test compares them with; they are written out here so that planning needs no torch.
With `virtual_stages` v, stage r of P runs the chunks r, r + P, r + 2P, ..., v of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, count, islice, repeat
from typing import NamedTuple, overload

from lime_dist.errors import ConfigError, shown


class Kind(Enum):
    FORWARD = "F"
    BACKWARD = "B"


class Action(NamedTuple):
    """One pass of one microbatch through one chunk, which is numbered in the order of the model."""

    kind: Kind
    chunk: int
    microbatch_index: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind.value}{self.microbatch_index}"


class _Actions(Sequence[Action], ABC):
    """Actions that are made when they are asked for: those of all stages of a long step would fill the memory."""

    @overload
    def __getitem__(self, index: int) -> Action: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Action, ...]: ...
    def __getitem__(self, index: int | slice) -> Action | tuple[Action, ...]:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else tuple(map(self._at, places))

    @abstractmethod
    def _at(self, place: int) -> Action: ...


@dataclass(frozen=True, kw_only=True)
class Passes(_Actions):
    """Of one kind, of all microbatches through a stage's chunks in their order: a round through one chunk after another.

    backwards: the last microbatch of a round first.
    """

    kind: Kind
    chunks: range
    num_microbatches: int
    num_rounds: int = 1
    backwards: bool = False

    @property
    def round_size(self) -> int:
        """Microbatches of a round, which the first rounds have one more of where they cannot be equal."""
        return self.num_microbatches // self.num_rounds

    @property
    def _num_longer(self) -> int:
        return self.num_microbatches % self.num_rounds

    def __len__(self) -> int:
        return len(self.chunks) * self.num_microbatches

    def __iter__(self) -> Iterator[Action]:
        ends = [*accumulate(self.round_size + (index < self._num_longer) for index in range(self.num_rounds))]
        for start, end in zip([0, *ends], ends):
            microbatches = range(start, end)[::-1] if self.backwards else range(start, end)
            for chunk in self.chunks:
                yield from map(Action, repeat(self.kind), repeat(chunk), microbatches)

    def _at(self, place: int) -> Action:
        start, size = 0, self.round_size + 1
        if place >= (longer := len(self.chunks) * self._num_longer * size):
            start, size, place = self._num_longer * size, size - 1, place - longer
        round_index, place = divmod(place, len(self.chunks) * size)
        chunk_index, place = divmod(place, size)
        index = start + round_index * size + (size - 1 - place if self.backwards else place)
        return Action(self.kind, self.chunks[chunk_index], index)

    def counts(self, number: int) -> dict[int, int]:
        """How many of the first `number` are of each chunk. Only where rounds are equal."""
        size = self.round_size
        rounds, rest = divmod(number, len(self.chunks) * size)
        return {
            chunk: rounds * size + min(size, max(0, rest - index * size)) for index, chunk in enumerate(self.chunks)
        }


@dataclass(frozen=True, kw_only=True)
class Step(_Actions):
    """What a stage does in a training step: `warmup` forwards, then a backward and a forward in turn, then the backwards left."""

    forwards: Passes
    backwards: Passes
    warmup: int

    def __len__(self) -> int:
        return len(self.forwards) + len(self.backwards)

    def __iter__(self) -> Iterator[Action]:
        forwards, backwards = iter(self.forwards), iter(self.backwards)
        yield from islice(forwards, self.warmup)
        for forward, backward in zip(forwards, backwards):
            yield backward
            yield forward
        yield from backwards

    def _at(self, place: int) -> Action:
        num_forwards = len(self.forwards)
        if place < self.warmup:
            return self.forwards[place]
        if place >= 2 * num_forwards - self.warmup:
            return self.backwards[place - num_forwards]
        turn, is_forward = divmod(place - self.warmup, 2)
        return self.forwards[self.warmup + turn] if is_forward else self.backwards[turn]

    def peaks(self) -> tuple[dict[int, int], ...]:
        """The numbers of microbatches that chunks hold when the stage holds most, by chunk.

        After each forward from the last of the warm-up on it holds as many, of chunks that change from round to round alike.
        Between those moments at which a forward or a backward comes to the next chunk, which these are, the numbers
        change evenly: whatever is linear in them is largest at one of these.
        """
        size = self.forwards.round_size
        turns = min(len(self.forwards) - self.warmup, size * len(self.forwards.chunks))
        corners = {0, turns, *range(0, turns, size), *range(-self.warmup % size, turns, size)}
        moments = (self._held_after(turn) for turn in sorted(corners))
        return tuple({tuple(held.items()): held for held in moments}.values())

    def _held_after(self, turn: int) -> dict[int, int]:
        forward, back = self.forwards.counts(self.warmup + turn), self.backwards.counts(turn)
        return {chunk: number - back[chunk] for chunk, number in forward.items()}


@dataclass(frozen=True, kw_only=True)
class _Pipeline:
    num_stages: int
    num_microbatches: int
    virtual_stages: int = 1

    @property
    def num_rounds(self) -> int:
        """Of microbatches: a stage runs a round through one of its chunks after another, as torch does. None is smaller than the
        pipeline if it can be."""
        return max(1, self.num_microbatches // self.num_stages)

    @property
    def microbatches_per_round(self) -> int:
        """The number where rounds are equal."""
        return self.num_microbatches // self.num_rounds

    def chunks(self, stage_index: int) -> range:
        return range(stage_index, self.num_stages * self.virtual_stages, self.num_stages)

    def passes(self, kind: Kind, stage_index: int) -> Passes:
        """With one chunk a stage rounds make no difference."""
        chunks, num_rounds = self.chunks(stage_index), self.num_rounds if self.virtual_stages > 1 else 1
        return Passes(
            kind=kind,
            chunks=chunks if kind is Kind.FORWARD else chunks[::-1],
            num_microbatches=self.num_microbatches,
            num_rounds=num_rounds,
        )

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


def _gpipe(pipeline: _Pipeline, stage_index: int, warmup: int | None) -> Step:
    """All forwards before all backwards; with virtual stages breadth-first (Lamy-Poirier 2022, arXiv 2211.05953).

    The backwards of torch's ScheduleGPipe begin with the first microbatch, those of its ScheduleLoopedBFS with the last.
    """
    chunks, number, is_virtual = pipeline.chunks(stage_index), pipeline.num_microbatches, pipeline.virtual_stages > 1
    forwards = Passes(kind=Kind.FORWARD, chunks=chunks, num_microbatches=number)
    backwards = Passes(kind=Kind.BACKWARD, chunks=chunks[::-1], num_microbatches=number, backwards=is_virtual)
    return Step(forwards=forwards, backwards=backwards, warmup=len(forwards))


def _one_forward_one_backward(pipeline: _Pipeline, stage_index: int, warmup: int | None) -> Step:
    """PipeDream-flush, and interleaved 1F1B with virtual stages (Narayanan et al. 2021, section 2.2)."""
    forwards = pipeline.passes(Kind.FORWARD, stage_index)
    backwards = pipeline.passes(Kind.BACKWARD, stage_index)
    first = min(len(forwards), pipeline.warmup(stage_index, warmup))
    return Step(forwards=forwards, backwards=backwards, warmup=first)


_SCHEDULES: dict[str, Callable[[_Pipeline, int, int | None], Step]] = {
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
) -> Step:
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
) -> Passes:
    """Evaluation: every microbatch forward, nothing back, in the order of interleaved 1F1B, for any number of them."""
    pipeline = _Pipeline(num_stages=num_stages, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    return pipeline.passes(Kind.FORWARD, stage_index)
