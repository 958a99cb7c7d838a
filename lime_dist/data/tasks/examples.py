"""What a synthetic task is: a source of examples, the groups that accuracy is shown by, and the verdict on an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class Example:
    """What a model is given, and what it is to continue with: the answer alone is trained on."""

    prompt: str
    answer: str


class Task(ABC):
    """What the builder and the evaluation ask of a task.

    words, characters: what gets token ids of its own (`list_tokenizer`). group_name: what `group` counts.
    sizes: by split, the examples of each kind. num_kinds: kinds of examples, which take turns.
    """

    name: ClassVar[str]
    group_name: ClassVar[str]
    words: ClassVar[Sequence[str]]
    characters: ClassVar[str]
    sizes: ClassVar[Mapping[str, int]]
    num_kinds: int = 1

    @abstractmethod
    def generate(self, draw: Random, index: int) -> Example:
        """The `index`-th example of a file, by `draw.random()` alone: the method that all Python versions agree on."""

    @abstractmethod
    def group(self, prompt: str) -> int:
        """How hard the example is."""

    def canonical(self, prompt: str) -> str:
        """The same for prompts that ask the same in another order: no split has one of another split's."""
        return prompt

    @abstractmethod
    def is_right(self, answer: str, generated: str) -> bool:
        """Whether what a model generated ends as the answer does."""


def draw_below(draw: Random, count: int) -> int:
    """A whole number from 0 up to `count`, that one not included."""
    return int(draw.random() * count)


def draw_order(draw: Random, count: int) -> list[int]:
    """The numbers below `count` in some order (Fisher-Yates)."""
    order = list(range(count))
    for last in range(count - 1, 0, -1):
        other = draw_below(draw, last + 1)
        order[last], order[other] = order[other], order[last]
    return order


def draw_weighted(draw: Random, weights: Sequence[float]) -> int:
    """An index by weight."""
    place = draw.random() * sum(weights)
    for index, weight in enumerate(weights):
        place -= weight
        if place < 0:
            return index
    return len(weights) - 1
