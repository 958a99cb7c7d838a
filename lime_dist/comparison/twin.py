"""The LLaMA twin of a LIMe config: the same run without routers, to be compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lime_dist.config import Config, check_config, parse_config
from lime_dist.config.reading import apply_override, read_config
from lime_dist.depth.kinds import OPTIONS
from lime_dist.errors import ConfigError, shown

_MEANINGLESS = {"weights_from", "switch_at", "pattern_name", *OPTIONS}  # under depth, without routers
_WORD = re.compile(r"(?<![a-z])lime(?![a-z])", re.IGNORECASE)


def llama_twin(path: Path, overrides: Sequence[str] = ()) -> str:
    """YAML of the keys that the file and the overrides set, and of no other. Raises: ConfigError."""
    tree = read_config(path)
    for override in overrides:
        apply_override(tree, override)
    config = check_config(parse_config(tree))
    _check_has_twin(path, config)
    return yaml.safe_dump(
        _without_routers(tree, config), sort_keys=False, default_flow_style=None, width=120, allow_unicode=True
    )


def _check_has_twin(path: Path, config: Config) -> None:
    if config.depth.router == "none":
        raise ConfigError(f"depth.router: {path} is a LLaMA config already (none); name a LIMe config")
    for key in ("resume", "weights_from"):
        folder = getattr(config.checkpoint, key)
        if folder not in (None, "auto", "never"):
            raise ConfigError(
                f"checkpoint.{key}: {shown(folder)} has routers, which LLaMA cannot begin with; leave it out of the twin with "
                f"checkpoint.{key}={'auto' if key == 'resume' else 'null'}, or train its own"
            )


def _without_routers(tree: dict[str, Any], config: Config) -> dict[str, Any]:
    dropped = _MEANINGLESS | ({"pattern"} if _is_chosen(config) else set())
    depth = {key: value for key, value in (tree.get("depth") or {}).items() if key not in dropped}
    run = tree.get("run") or {}
    kept = {name: section for name, section in tree.items() if name != "analysis"}  # it is of routers
    return kept | {"depth": depth | {"router": "none"}, "run": run | {"dir": twin_folder(config.run.dir)}}


def _is_chosen(config: Config) -> bool:
    """A pattern of a file's, of weights', of bytes' or of stages' making, or a list of edges."""
    return config.depth.is_chosen or config.depth.name.startswith("edges:") or not isinstance(config.depth.pattern, str)


def twin_folder(run_dir: str) -> str:
    """Where its twin trains: lime_x -> llama_x; x -> x_llama."""
    folder = Path(run_dir)
    if folder.name in ("", ".."):
        return str(folder / "llama")
    name, count = _WORD.subn("llama", folder.name)
    return str(folder.with_name(name if count else f"{name}_llama"))
