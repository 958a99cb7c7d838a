"""YAML and dotted overrides to dataclasses and back. An unknown key is refused with the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lime_dist.config.paths import with_absolute_paths
from lime_dist.config.schema import Config, Source
from lime_dist.config.yaml_text import MAX_TEXT_BYTES, parse_yaml
from lime_dist.errors import ConfigError, shown
from lime_dist.lifecycle.ownership import OWNER_FILE

_MAX_SECTIONS = 10  # of an override
_KNOWN_SHOWN = 10
RUN_CONFIG, RUN_PLAN = "config.yaml", "plan.json"  # in a run's folder: the resolved config, and the plan
_BESIDE = (OWNER_FILE, RUN_PLAN)  # of which either tells a run's folder from others


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a run's folder and apply `section.key=value` overrides (values are YAML). Does not `check_config`.

    Raises: ConfigError.
    """
    return parse_config(read_config(path), overrides)


def read_config(path: str | Path) -> dict[str, Any]:
    """The sections that a YAML file sets, or the `config.yaml` of a run's folder.

    That folder is `run.dir` wherever it lies by now, and its checkpoints are what the run goes on from: `checkpoint.resume` said
    where its first start did. Raises: ConfigError.
    """
    is_folder = os.path.isdir(path)
    if is_folder and not os.path.isfile(Path(path, RUN_CONFIG)):
        raise ConfigError(
            f"config {path}: a folder without {RUN_CONFIG}; give a YAML file, or the folder of a run that began"
        )
    file = Path(path, RUN_CONFIG) if is_folder else Path(path)
    tree = read_yaml(file, "config", "sections such as `model:` and `run:`")
    if not is_folder and not _is_of_run(file):
        return tree
    own = {"run": {"dir": str(file.parent)}, "checkpoint": {"resume": "auto"}}
    found = {section: tree.get(section) or {} for section in own}
    return tree | {one: {**found[one], **own[one]} for one in own if isinstance(found[one], Mapping)}


def _is_of_run(file: Path) -> bool:
    """Whether it is the config of the run whose folder it lies in."""
    return file.name == RUN_CONFIG and any(os.path.isfile(file.parent / name) for name in _BESIDE)


def read_yaml(path: str | Path, what: str, content: str) -> dict[str, Any]:
    """The mapping in a YAML file; `what` and `content` say in errors what it is and should hold. Raises: ConfigError."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_TEXT_BYTES + 1).decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{what} {path}: not UTF-8; give the path of a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{what} {path}: {reason}; give the path of a YAML file") from None
    tree = parse_yaml(text, f"{what} {path}")
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{what} {path}: must hold {content}")
    return tree or {}


def parse_config(tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build the dataclasses from nested mappings. Raises: ConfigError."""
    tree = {name: dict(section) if isinstance(section, Mapping) else section for name, section in tree.items()}
    for override in overrides:
        apply_override(tree, override)
    return build_section(Config, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def recorded(config: Config) -> dict[str, Any]:
    """As it is written down: with absolute paths."""
    return to_dict(with_absolute_paths(config))


def dump_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to the same `Config`, but for paths, which are absolute."""
    return yaml.safe_dump(recorded(config), sort_keys=False)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` (the value is YAML) in `tree`. Raises: ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {shown(override)}: write section.key=value")
    if key.count(".") > _MAX_SECTIONS:
        raise ConfigError(f"override {shown(key)}: more than {_MAX_SECTIONS} sections; write section.key=value")
    value = parse_yaml(text, f"override {key}")
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        if child is None:
            child = {}
        elif not isinstance(child, Mapping):
            raise ConfigError(f"override {key}: {section} is not a section")
        node[section] = dict(child)
        node = node[section]
    node[name] = value


def is_override(word: str) -> bool:
    """Whether it sets a key, among words of an option that takes others: no name of a pattern or folder looks so."""
    return re.match(r"[^:/=]+\.[^:/=]+=", word) is not None


def build_section(cls: Any, values: Any, prefix: str) -> Any:
    """The dataclass `cls` from a mapping; `prefix` stands before its keys in errors. Raises: ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: must be a section with keys, not {shown(values)}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ConfigError(f"{prefix}{shown_key(name)}: unknown key{nearest(str(name), fields)}")
    missing = [
        name
        for name, item in fields.items()
        if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]}: missing; add it")
    return cls(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def shown_key(name: Any) -> str:
    """A user's key as messages show it."""
    return shown(name).strip("'")


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown `name`: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name[:100], list(known), n=1)
    if close:
        return f"; did you mean {close[0]}?"
    first = list(known)[:_KNOWN_SHOWN]
    return f"; known: {', '.join(first)}" + (", ..." if len(first) < len(list(known)) else "")


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build_section(hint, {} if value is None else value, f"{key}.")
    section = next(filter(dataclasses.is_dataclass, _options(hint)), None)
    if section is not None and value is not None:
        return build_section(section, value, f"{key}.")
    if typing.get_origin(hint) is dict and typing.get_args(hint)[0] is int and isinstance(value, Mapping):
        return _convert_numbered(typing.get_args(hint)[1], value, key)
    if hint == list[Source]:
        return [_source(item, f"{key}[{index}]") for index, item in enumerate(_as_list(value))]
    converted = {} if value is None and typing.get_origin(hint) is dict else _convert_any(_options(hint), value)
    if converted is _MISMATCH:
        raise ConfigError(f"{key}: {shown(value)} is not {' or '.join(map(_type_name, _options(hint)))}")
    return converted


def _convert_numbered(hint: Any, values: Mapping[Any, Any], key: str) -> dict[int, Any]:
    """Entries by whole numbers, each named by its own in errors. JSON makes text of such keys."""
    converted: dict[int, Any] = {}
    for name, value in values.items():
        number = int(name) if _is_number(name) else name
        if isinstance(number, bool) or not isinstance(number, int):
            raise ConfigError(f"{key}: {shown(name)} is not a whole number; correct it")
        if number in converted:
            raise ConfigError(f"{key}.{number}: appears twice; remove one of them")
        converted[number] = _convert(hint, value, f"{key}.{number}")
    return converted


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _convert_any(options: tuple[Any, ...], value: Any) -> Any:
    """`value` as the first of `options` that fits, or _MISMATCH."""
    converted = (_convert_plain(option, value) for option in options)
    return next((result for result in converted if result is not _MISMATCH), _MISMATCH)


_MISMATCH = object()


def _convert_plain(option: Any, value: Any) -> Any:
    """`value` as `option`, or _MISMATCH. YAML reads 1e-3 as text, so numbers are tried for text as well."""
    if option is type(None):
        return None if value is None else _MISMATCH
    if option is bool or isinstance(value, bool):
        return value if option is bool and isinstance(value, bool) else _MISMATCH
    if option is float:
        try:
            return float(value) if isinstance(value, (int, float, str)) else _MISMATCH
        except (ValueError, OverflowError):
            return _MISMATCH
    if typing.get_origin(option) is list:
        (item_type,) = typing.get_args(option)
        items = [_convert_plain(item_type, item) for item in value] if isinstance(value, (list, tuple)) else [_MISMATCH]
        return _MISMATCH if any(item is _MISMATCH for item in items) else items
    if typing.get_origin(option) is dict:
        return _convert_mapping(typing.get_args(option), value)
    return value if isinstance(value, option) else _MISMATCH


def _convert_mapping(types_: tuple[Any, Any], value: Any) -> Any:
    """A mapping whose keys and values fit; JSON makes text of whole-number keys, so these are turned back."""
    if not isinstance(value, Mapping):
        return _MISMATCH
    key_type, value_type = types_
    if key_type is int:
        numbered = {int(key) if _is_number(key) else key: item for key, item in value.items()}
        if len(numbered) < len(value):  # such as 5 and '5'
            return _MISMATCH
        value = numbered
    if value_type is Any:
        return dict(value)
    items = {key: _convert_any(_options(value_type), item) for key, item in value.items()}
    fits = all(_convert_plain(key_type, key) is not _MISMATCH for key in items)
    fits = fits and not any(item is _MISMATCH for item in items.values())
    return items if fits else _MISMATCH


def _is_number(key: Any) -> bool:
    return isinstance(key, str) and bool(re.fullmatch(r"-?\d{1,18}", key, re.ASCII))


_MAPPINGS = {
    dict[int, list[int]]: "readers with their earlier layers, such as {3: [0, 2]}",
    dict[int, str | dict[int, list[int]]]: "steps with a pattern each, such as {10000: first:2}",
}


def _type_name(option: Any) -> str:
    if typing.get_origin(option) is dict:
        return _MAPPINGS.get(option, "a section with keys")
    if typing.get_origin(option) is not None:
        return str(option)
    return {
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "bool": "true or false",
        "NoneType": "null",
    }.get(option.__name__, option.__name__)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _source(item: Any, key: str) -> Source:
    if isinstance(item, str):
        return Source(path=item)
    return build_section(Source, item, f"{key}.")
