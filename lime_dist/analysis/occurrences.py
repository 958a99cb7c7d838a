"""Where the words of the probe stand in token sequences, by the texts of their ids. No torch.

A word may be several tokens; its place is the last of them, where a causal model has read all of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lime_dist.data.special_tokens import UNKNOWN_TEXT

WORDS = ("is", "are", "was", "were")  # arXiv 2502.09245v2
# A whole word in lower case; "isn't" is another one. What is unknown may be a letter.
_WORD = re.compile(rf"(?<![\w{UNKNOWN_TEXT}])(?:{'|'.join(WORDS)})(?![\w{UNKNOWN_TEXT}]|['\u2019]\w)")


@dataclass(frozen=True)
class Occurrence:
    """Of `WORDS[label]`, which ends at token `position` of sequence `sequence`."""

    sequence: int
    position: int
    label: int


def find_words(tokens: Sequence[int], texts: Sequence[str]) -> list[tuple[int, int]]:
    """(position of the last token, label) of each word whose ends the sequence and its tokens show.

    A word at either end of the sequence may go on outside, so it is left out; so is one within a longer token.
    """
    parts = [texts[token] for token in tokens]
    text = "".join(parts)
    position_of = {end: position for position, end in enumerate(accumulate(map(len, parts))) if parts[position]}
    return [
        (position_of[match.end()], WORDS.index(match.group()))
        for match in _WORD.finditer(text)
        if match.start() > 0 and match.end() < len(text) and match.end() in position_of
    ]


def find_occurrences(
    sequences: Iterable[Sequence[int]], texts: Sequence[str], *, limit: int
) -> tuple[list[Occurrence], dict[str, int]]:
    """The first of each word, equally many, at most `limit`; and how many of each there were until all had as many.

    sequences: of seq + 1 tokens, of which the last is not an input.
    """
    found: list[Occurrence] = []
    counts: Counter[int] = Counter()
    for sequence, tokens in enumerate(sequences):
        for position, label in find_words(tokens, texts):
            if position < len(tokens) - 1:
                found.append(Occurrence(sequence, position, label))
                counts[label] += 1
        if all(counts[label] >= limit for label in range(len(WORDS))):
            break
    wanted = min(limit, *(counts[label] for label in range(len(WORDS))))
    return _first_of_each(found, wanted), {word: counts[label] for label, word in enumerate(WORDS)}


def _first_of_each(found: list[Occurrence], wanted: int) -> list[Occurrence]:
    taken: Counter[int] = Counter()
    chosen = []
    for occurrence in found:
        if taken[occurrence.label] < wanted:
            taken[occurrence.label] += 1
            chosen.append(occurrence)
    return chosen
