"""Arithmetic expressions and their evaluation step by step: "(7+5)/4-2=12/4-2=3-2=1".

Built backwards: from a number, which is replaced by two operands and an operator of that value, then one of these numbers,
and so on; the expressions in reverse are the evaluation. Operands are single digits, what stands between is at most
`LARGEST_VALUE`, divisions leave no remainder, and no factor or divisor is 1.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from lime_dist.data.tasks.examples import Example, Task, draw_below
from lime_dist.errors import DataError

LARGEST_OPERAND = 9
LARGEST_VALUE = 99
MOST_OPERANDS = 12
DEFAULT_OPERANDS = (4, 5, 6)

_OPERATORS = "+-*/"
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_OF_A_NUMBER = 3
_NUMBER = re.compile(r"[0-9]+")


class Arithmetic(Task):
    """As many expressions of each number of operands, in turn. Raises: DataError for an impossible number."""

    name = "arithmetic"
    group_name = "operands"
    words = ()
    characters = "0123456789+-*/()="
    sizes = {"train": 50_000, "valid": 1_000}  # the paper does not say how many it holds out

    def __init__(self, operands: Sequence[int] = DEFAULT_OPERANDS) -> None:
        for count in operands:
            if not 2 <= count <= MOST_OPERANDS:
                raise DataError(f"--operands: {count} must be from 2 to {MOST_OPERANDS}")
        if not operands or len(set(operands)) < len(operands):
            raise DataError("--operands: give one or more different numbers, such as 4,5,6")
        self.operands, self.num_kinds = tuple(operands), len(operands)

    def generate(self, draw: Random, index: int) -> Example:
        history = expand(draw, self.operands[index % self.num_kinds])
        texts = [str(expression) for expression in reversed(history)]
        return Example(prompt=texts[0], answer="".join(f"={text}" for text in texts[1:]))

    def group(self, prompt: str) -> int:
        return len(_NUMBER.findall(prompt))

    def canonical(self, prompt: str) -> str:
        """Of all orders and brackets of a sum's terms, and of a product's factors."""
        return _canonical(ast.parse(prompt, mode="eval").body)

    def is_right(self, answer: str, generated: str) -> bool:
        return "=" in generated and _last_value(generated) == _last_value(answer)


def _last_value(text: str) -> str:
    return text[text.rindex("=") + 1 :]


_KINDS: dict[type[ast.operator], tuple[str, int]] = {  # sum or product, and whether the right side is turned
    ast.Add: ("+", 1), ast.Sub: ("+", -1), ast.Mult: ("*", 1), ast.Div: ("*", -1),
}  # fmt: skip


def _canonical(node: ast.expr) -> str:
    if not isinstance(node, ast.BinOp):
        return ast.unparse(node)
    kind, _ = _KINDS[type(node.op)]
    parts = sorted(f"{sign:+d}{_canonical(part)}" for sign, part in _parts(node, kind, 1))
    return f"{kind}({' '.join(parts)})"


def _parts(node: ast.expr, kind: str, sign: int) -> Iterator[tuple[int, ast.expr]]:
    """Terms of a sum, factors of a product; sign: -1 of those that are taken away, or divided by."""
    if not isinstance(node, ast.BinOp) or _KINDS[type(node.op)][0] != kind:
        yield sign, node
        return
    yield from _parts(node.left, kind, sign)
    yield from _parts(node.right, kind, sign * _KINDS[type(node.op)][1])


@dataclass(frozen=True)
class Expression:
    """A number, or two expressions joined by an operator, with what it is worth."""

    value: int
    operator: str = ""
    parts: tuple[Expression, ...] = ()

    def __str__(self) -> str:
        if not self.parts:
            return str(self.value)
        left, right = self.parts
        return f"{left._within(self.operator, False)}{self.operator}{right._within(self.operator, True)}"

    def _within(self, operator: str, is_right: bool) -> str:
        """In brackets where the value of the whole would be another without them."""
        own = _PRECEDENCE.get(self.operator, _OF_A_NUMBER)
        needed = own < _PRECEDENCE[operator] or (is_right and own == _PRECEDENCE[operator] and operator in "-/")
        return f"({self})" if needed else str(self)

    def numbers(self) -> list[int]:
        """From left to right."""
        return [number for part in self.parts for number in part.numbers()] if self.parts else [self.value]

    def with_number(self, place: int, instead: Expression) -> Expression:
        """With the number at `place`, from left to right, replaced."""
        if not self.parts:
            return instead
        left, right = self.parts
        on_the_left = len(left.numbers())
        if place < on_the_left:
            return Expression(self.value, self.operator, (left.with_number(place, instead), right))
        return Expression(self.value, self.operator, (left, right.with_number(place - on_the_left, instead)))


def expand(draw: Random, operands: int) -> list[Expression]:
    """A number, the same as two operands, ... up to `operands` of them, which are single digits.

    Only what can still end in single digits is drawn from (`operands_needed`), so that nothing is drawn in vain.
    """
    needed = operands_needed()
    starts = [value for value, count in needed.items() if count <= operands]
    history = [Expression(starts[draw_below(draw, len(starts))])]
    while (count := len(history)) < operands:
        numbers = history[-1].numbers()
        spare = operands - sum(needed[number] for number in numbers)
        places = [place for place in range(count) if splits(numbers[place], needed[numbers[place]] + spare)]
        place = places[draw_below(draw, len(places))]
        by_operator = splits(numbers[place], needed[numbers[place]] + spare)
        operator, pairs = by_operator[draw_below(draw, len(by_operator))]
        pair = pairs[draw_below(draw, len(pairs))]
        instead = Expression(numbers[place], operator, tuple(map(Expression, pair)))
        history.append(history[-1].with_number(place, instead))
    return history


Pairs = tuple[tuple[int, int], ...]


@cache
def splits(value: int, operands: int) -> tuple[tuple[str, Pairs], ...]:
    """For each operator, the pairs of that value that `operands` single digits can make."""
    needed = operands_needed()
    allowed = [
        (operator, tuple(pair for pair in pairs if needed[pair[0]] + needed[pair[1]] <= operands))
        for operator, pairs in _all_splits()[value].items()
    ]
    return tuple((operator, pairs) for operator, pairs in allowed if pairs)


@cache
def operands_needed() -> dict[int, int]:
    """The fewest single digits that make each value."""
    needed = {value: 1 for value in range(1, LARGEST_OPERAND + 1)}
    while len(needed) < LARGEST_VALUE:
        made = {
            value: min(needed[left] + needed[right] for left, right in known)
            for value in range(1, LARGEST_VALUE + 1)
            if value not in needed and (known := [pair for pair in _pairs(value) if needed.keys() >= set(pair)])
        }
        fewest = min(made.values())
        needed |= {value: count for value, count in made.items() if count == fewest}
    return dict(sorted(needed.items()))


def _pairs(value: int) -> Pairs:
    return tuple(pair for pairs in _all_splits()[value].values() for pair in pairs)


@cache
def _all_splits() -> dict[int, dict[str, Pairs]]:
    """By value and operator, the pairs of values that make it."""
    found: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: {operator: [] for operator in _OPERATORS})
    for left in range(1, LARGEST_VALUE + 1):
        for right in range(1, LARGEST_VALUE + 1):
            found[left + right]["+"].append((left, right))
            found[left - right]["-"].append((left, right))
            if left > 1 and right > 1:
                found[left * right]["*"].append((left, right))
            if right > 1 and left % right == 0:
                found[left // right]["/"].append((left, right))
    return {
        value: {operator: tuple(pairs) for operator, pairs in found[value].items()}
        for value in range(1, LARGEST_VALUE + 1)
    }
