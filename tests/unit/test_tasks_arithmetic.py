"""Arithmetic: every step is a true rewriting of the one before, brackets stand only where needed, numbers keep their range."""

from __future__ import annotations

import ast
import re
from fractions import Fraction
from random import Random

import pytest

from lime_dist.data.tasks import arithmetic
from lime_dist.data.tasks.arithmetic import Arithmetic, Expression, expand, operands_needed
from lime_dist.data.tasks.examples import Example
from lime_dist.errors import DataError

TASK = Arithmetic()
PINNED = [
    Example(prompt="9*(8-7+3)", answer="=9*(1+3)=9*4=36"),
    Example(prompt="1+1+5*9+2", answer="=1+1+45+2=1+1+47=2+47=49"),
]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = Random("arithmetic")
    examples = [TASK.generate(draw, index) for index in range(1500)]
    return [example.prompt + example.answer for example in examples]


def exactly(text: str) -> Fraction:
    """By Python's own grammar, in fractions."""
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", text), {"Fraction": Fraction})


def test_all_sides_are_equal(texts: list[str]) -> None:
    for text in texts:
        sides = text.split("=")
        assert len({exactly(side) for side in sides}) == 1, text
        assert sides[-1].isdecimal()


def test_each_step_takes_one_operation_away(texts: list[str]) -> None:
    for index, text in enumerate(texts):
        counts = [len(re.findall(r"\d+", side)) for side in text.split("=")]
        assert counts == list(range(TASK.operands[index % 3], 0, -1)), text


def test_a_step_replaces_two_neighbours_by_what_they_are_worth(texts: list[str]) -> None:
    """All numbers but two stay, in order."""
    for text in texts:
        sides = [[int(number) for number in re.findall(r"\d+", side)] for side in text.split("=")]
        for before, after in zip(sides, sides[1:]):
            assert any(
                before[:place] + [after[place]] + before[place + 2 :] == after
                and any(exactly(f"{before[place]}{operator}{before[place + 1]}") == after[place] for operator in "+-*/")
                for place in range(len(after))
            ), text


def test_numbers_keep_their_range(texts: list[str]) -> None:
    for text in texts:
        numbers = [[int(number) for number in re.findall(r"\d+", side)] for side in text.split("=")]
        assert all(1 <= number <= arithmetic.LARGEST_OPERAND for number in numbers[0]), text
        assert all(1 <= number <= arithmetic.LARGEST_VALUE for side in numbers for number in side), text


def test_every_pair_of_brackets_is_needed(texts: list[str]) -> None:
    """Without any one pair the expression is another, by Python's grammar up to what + and * let one regroup."""
    seen = 0
    for text in texts:
        for side in text.split("="):
            for inner in re.finditer(r"\([^()]*\)", side):
                bare = side[: inner.start()] + inner[0][1:-1] + side[inner.end() :]
                seen += 1
                assert ast.dump(ast.parse(bare)) != ast.dump(ast.parse(side)), side
                assert re.search(r"[-/*]\($", side[: inner.start() + 1]) or re.match(r"[*/]", side[inner.end() :]), side
    assert seen > 300


@pytest.mark.parametrize(
    ("operator", "left", "right", "text"),
    [
        ("+", ("+", 1, 2), ("+", 3, 4), "1+2+3+4"),
        ("-", ("-", 9, 2), ("-", 3, 1), "9-2-(3-1)"),
        ("*", ("+", 1, 2), ("*", 2, 4), "(1+2)*2*4"),
        ("/", ("*", 4, 6), ("/", 6, 2), "4*6/(6/2)"),
        ("+", ("*", 4, 6), ("/", 6, 2), "4*6+6/2"),
        ("*", ("/", 6, 2), ("/", 8, 4), "6/2*8/4"),
    ],
)
def test_brackets(operator: str, left: tuple, right: tuple, text: str) -> None:
    def part(sign: str, one: int, other: int) -> Expression:
        return Expression(int(exactly(f"{one}{sign}{other}")), sign, (Expression(one), Expression(other)))

    whole = Expression(0, operator, (part(*left), part(*right)))
    assert str(whole) == text
    assert exactly(text) == exactly(f"({left[1]}{left[0]}{left[2]}){operator}({right[1]}{right[0]}{right[2]})")


def test_the_fewest_operands() -> None:
    """By search: what n digits make is what two smaller counts make."""
    made = {1: set(range(1, 10))}
    for count in range(2, 5):
        made[count] = {
            int(value)
            for first in range(1, count)
            for one in made[first]
            for other in made[count - first]
            for operator in "+-*/"
            if not (operator in "*/" and 1 in (other, one if operator == "*" else 0))
            if (value := exactly(f"{one}{operator}{other}")).denominator == 1 and 1 <= value <= 99
        }
    for value, fewest in operands_needed().items():
        assert fewest == min(count for count in made if value in made[count]), value


@pytest.mark.parametrize("operands", [2, 3, 7, arithmetic.MOST_OPERANDS])
def test_any_number_of_operands(operands: int) -> None:
    draw = Random(1)
    for _ in range(50):
        history = expand(draw, operands)
        assert len(history) == operands and max(history[-1].numbers()) <= arithmetic.LARGEST_OPERAND


def test_the_group_and_the_verdict() -> None:
    assert TASK.group("(7+5)/(6+4*3-2*7)") == 7
    answer = "=12/4=3"
    assert TASK.is_right(answer, "=12/4=3")
    assert TASK.is_right(answer, "=5=3")  # the last value alone counts
    for wrong in ("", "3", "=13", "=12/4=3=", "=12/4=3+0", "=12/4"):
        assert not TASK.is_right(answer, wrong), wrong


@pytest.mark.parametrize("operands", [(1,), (4, 13), (), (4, 4)], ids=str)
def test_operands_that_cannot_be(operands: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="^--operands: "):
        Arithmetic(operands)


def test_examples_are_pinned() -> None:
    """A change here changes what a seed gives."""
    draw = Random("pinned")
    assert [TASK.generate(draw, index) for index in range(2)] == PINNED


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("1+2*3", "3*2+1", True),
        ("9-4+2", "2+9-4", True),
        ("9-(4-2)", "9-4+2", True),
        ("8/2*3", "3*8/2", True),
        ("8/(2*2)", "8/2/2", True),
        ("(1+2)*3", "3*(2+1)", True),
        ("9-4", "4-9", False),
        ("8/2", "2/8", False),
        ("1+2*3", "(1+2)*3", False),
        ("1+2+3", "1+2+4", False),
        ("2*3", "2+3", False),
    ],
)
def test_what_asks_the_same_in_another_order(one: str, other: str, alike: bool) -> None:
    assert (TASK.canonical(one) == TASK.canonical(other)) is alike
