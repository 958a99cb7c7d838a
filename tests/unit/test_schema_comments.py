"""Every key of a run's configuration says in the source what it is: the README sends users there."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator

import pytest

from lime_dist.config import schema


def source() -> str:
    with open(schema.__file__, encoding="utf-8") as file:
        return file.read()


def keys() -> Iterator[tuple[str, ast.AnnAssign]]:
    """The fields of each section, but for those of `Config`, which are the sections."""
    for node in ast.parse(source()).body:
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield f"{node.name}.{item.target.id}", item


KEYS = dict(keys())
# Line: whether the comment stands alone there.
COMMENTS = {
    token.start[0]: token.line.lstrip().startswith("#")
    for token in tokenize.generate_tokens(io.StringIO(source()).readline)
    if token.type == tokenize.COMMENT
}


def test_there_are_keys() -> None:
    assert len(KEYS) > 60 and {"ModelConfig.num_layers", "RunConfig.steps"} <= KEYS.keys()


@pytest.mark.parametrize("key", KEYS)
def test_it_has_a_comment(key: str) -> None:
    """At the end of its line, or on a line of its own right above it; not within an expression that a formatter broke for it."""
    node = KEYS[key]
    assert node.lineno == node.end_lineno, "put the comment above the field, which then fits a line"
    assert node.lineno in COMMENTS or COMMENTS.get(node.lineno - 1) is True
