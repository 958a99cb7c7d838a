"""YAML to plain values: the part of YAML that JSON has too, bounded in size, so that no text can hang or crash a command.

Owns what a YAML file or override may hold. Knows no key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from lime_dist.errors import ConfigError, one_line, shown

MAX_TEXT_BYTES = 4 * 2**20  # a resolved config with all edges of 512 layers has 1.3 MiB
_LARGE_TEXT = 2**16
MAX_VALUES = 300_000  # with aliases expanded
MAX_DEPTH = 20
MAX_INTEGER = 2**63 - 1

# Leaves 12:00:00 a text, which YAML 1.1 reads as 43200: a number to the base 60. Dates stay text as well.
_RESOLVERS = {
    first: [
        ("tag:yaml.org,2002:str", re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?$")),
        *((tag, pattern) for tag, pattern in known if not tag.endswith(":timestamp")),
    ]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS


class _LargeLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Ten times as fast, for files that were written by machine. It does not read all that people write, such as {3:[0]}."""

    yaml_implicit_resolvers = _RESOLVERS


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` holds, of dict, list, str, int, float, bool and None; `where` begins the errors.

    Raises: ConfigError for all that is not such a value, a key that appears twice, and a text too large or too nested.
    """
    try:
        if len(text) > MAX_TEXT_BYTES:
            raise _Refused(f"{len(text)} bytes; at most {MAX_TEXT_BYTES} are read")
        loader = _LargeLoader if len(text) > _LARGE_TEXT else _Loader
        _check_nesting(text, loader)
        node = yaml.compose(text, loader)
        return None if node is None else _Values().value(node, 0)
    except _Refused as error:
        raise ConfigError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: text that is no UTF-8
        raise ConfigError(f"{where}: not valid YAML: {one_line(error)}") from None


class _Refused(Exception):
    """What stands in the text, and the fix."""


def _check_nesting(text: str, loader: Any) -> None:
    """Before nodes are composed, which recurses."""
    depth = 0
    for event in yaml.parse(text, loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            assert event.start_mark is not None  # it was read from a text
            raise _Refused(f"line {event.start_mark.line + 1}: nested more than {MAX_DEPTH} deep; write it flatter")


class _Values:
    """Turns nodes into values, counting them: an alias is expanded each time that it stands somewhere."""

    def __init__(self) -> None:
        self._count = 0

    def value(self, node: yaml.Node, depth: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:  # an alias may hold itself
            raise _refused(node, f"more than {MAX_VALUES} values or {MAX_DEPTH} levels, aliases expanded; write less")
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            return _scalar(node, _SCALARS[kind])
        raise _refused(node, f"the tag {shown(node.tag)} is not read here; remove it")

    def _mapping(self, node: yaml.MappingNode, depth: int) -> dict[Any, Any]:
        own: dict[Any, Any] = {}
        merged: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = self._merged(value_node, depth) | merged
                continue
            key = self._key(key_node, depth)
            if key in own:
                raise _refused(key_node, f"the key {shown(key)} appears twice in its section; remove one of them")
            own[key] = self.value(value_node, depth + 1)
        return merged | own

    def _key(self, node: yaml.Node, depth: int) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise _refused(node, "a key must be a plain word or number")
        return self.value(node, depth + 1)

    def _merged(self, node: yaml.Node, depth: int) -> dict[Any, Any]:
        """What `<<` brings in: a mapping, or several of which the first counts."""
        value = self.value(node, depth + 1)
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(item, dict) for item in mappings):
            raise _refused(node, "<< takes a section or a list of sections")
        return {key: item for mapping in reversed(mappings) for key, item in mapping.items()}


def _refused(node: yaml.Node, what: str) -> _Refused:
    return _Refused(f"line {node.start_mark.line + 1}: {what}")


def _scalar(node: yaml.ScalarNode, read: Callable[[str], Any]) -> Any:
    try:
        return read(node.value)
    except (ValueError, OverflowError, KeyError):
        kind = node.tag.rpartition(":")[2]
        raise _refused(node, f"{shown(node.value)} is no {kind} that can be read; correct it") from None


def _integer(text: str) -> int:
    """YAML 1.1's forms: 0b1, 0x1f, 017, 1_000."""
    digits = text.replace("_", "").lstrip("+-")
    if len(digits) > 70:
        raise ValueError
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    value = int(digits, 8 if octal else 0)
    if not 0 <= value <= MAX_INTEGER:
        raise ValueError
    return -value if text.startswith("-") else value


def _float(text: str) -> float:
    digits = text.replace("_", "").lower()
    return float(digits.replace(".inf", "inf").replace(".nan", "nan"))


_BOOLEANS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": _integer,
    "float": _float,
    "bool": lambda text: _BOOLEANS[text.lower()],
    "null": lambda text: None,
}
