"""What a YAML file or override may hold; everything else is refused in one line, soon."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from lime_dist.config.yaml_text import _LARGE_TEXT, MAX_TEXT_BYTES, parse_yaml
from lime_dist.errors import MAX_LINE, ConfigError, one_line

READ = [  # text, value
    ("", None),
    ("3", 3),
    ("-0x1f", -31),
    ("0b101", 5),
    ("017", 15),
    ("1_000", 1000),
    ("1.5", 1.5),
    ("1e-3", "1e-3"),  # YAML 1.1; keys that take numbers read it
    ("-.inf", -math.inf),
    ("yes", True),
    ("12:00:00", "12:00:00"),
    ("2026-11-25", "2026-11-25"),
    ("!!str 3", "3"),
    ("{3:[0]}", {3: [0]}),
    ("[&a {x: 1}, *a]", [{"x": 1}, {"x": 1}]),
    ("{a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
]


@pytest.mark.parametrize(("text", "value"), READ)
def test_plain_values_are_read(text: str, value: Any) -> None:
    found = parse_yaml(text, "file")
    assert found == value and type(found) is type(value)


LAUGHS = "a0: &a0 [1]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))
REFUSED = [  # text, what is said
    ("a: 1\nb: 2\na: 3", "file: line 3: the key 'a' appears twice in its section; remove one of them"),
    ("0b_", "file: line 1: '0b_' is no int that can be read"),
    ("!!float x", "file: line 1: 'x' is no float"),
    ("!!bool maybe", "file: line 1: 'maybe' is no bool"),
    ("!!int ''", "file: line 1: '' is no int"),
    ("!!int " + "9" * 5000, "file: line 1: "),
    ("9223372036854775808", "file: line 1: '9223372036854775808' is no int"),
    ("!!timestamp 2026", "file: line 1: the tag 'tag:yaml.org,2002:timestamp' is not read here; remove it"),
    ("!!binary aGVq", "file: line 1: the tag "),
    ("!!python/name:os.system x", "file: line 1: the tag "),
    ("!!set {a, b}", "file: line 1: the tag "),
    ("? {}\n: 1", "file: line 1: a key must be a plain word or number"),
    ("&a [*a]", "file: line 1: more than "),
    ("{<<: 3}", "file: line 1: << takes a section"),
    (LAUGHS, "file: line 1: more than 300000 values or 20 levels, aliases expanded"),
    ("[" * 1000 + "]" * 1000, "file: line 1: nested more than 20 deep"),
    ("{a: " * 1000 + "}" * 1000, "file: line 1: nested more than 20 deep"),
    ("- " * 1000 + "a", "file: line 1: nested more than 20 deep"),
    ("x" * (MAX_TEXT_BYTES + 1), "file: 4194305 bytes; at most 4194304 are read"),
    ("[", "file: not valid YAML: "),
    ("a: *b", "file: not valid YAML: "),
    ("\udcff", "file: not valid YAML: "),
]


@pytest.mark.parametrize(
    ("text", "said"), REFUSED, ids=[case[0][:20].encode("unicode_escape").decode() for case in REFUSED]
)
def test_all_else_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "file")
    assert str(error.value).startswith(said) and len(one_line(error.value)) <= MAX_LINE


def test_a_large_file_is_read_alike() -> None:
    tree = {reader: list(range(reader)) for reader in range(200)}
    text = yaml.safe_dump(tree)
    assert len(text) > _LARGE_TEXT and parse_yaml(text, "file") == tree
    with pytest.raises(ConfigError, match="the key 7 appears twice"):
        parse_yaml(f"{text}\n7: []", "file")
