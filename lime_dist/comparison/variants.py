"""Runs that differ in their seed alone are one variant; a variant is named by what tells it from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lime_dist.comparison.run_folders import RecordedRun, RunFolderError
from lime_dist.config import Config, DepthConfig, recorded
from lime_dist.config.paths import from_here
from lime_dist.depth.kinds import ROUTINGS, options_of
from lime_dist.errors import shown

# What changes no number but by the order of its sums.
_SECTIONS_WITHOUT_EFFECT = ("parallel", "pipeline", "profile", "analysis", "wandb", "deepspeed")
_WITHOUT_EFFECT = {
    "run.seed", "run.dir", "run.log_every", "run.timeout_seconds", "run.memory", "run.peak_tflops", "run.device",
    "depth.policy", "checkpoint.every", "checkpoint.keep", "checkpoint.resume", "data.micro_batch_size",
}  # fmt: skip
# Of a pattern that has been resolved: by what its edges were chosen, and what they are called.
_SETTLED = {"depth.weights_from", "depth.pattern_name"}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One setting, and its runs by seed, ascending. settings: the keys that say what is trained, `section.key`."""

    name: str
    settings: Mapping[str, Any]
    runs: Mapping[int, RecordedRun]

    @property
    def first(self) -> RecordedRun:
        return next(iter(self.runs.values()))

    @property
    def config(self) -> Config:
        """Of the run of the lowest seed; the others' is the same but for what has no effect."""
        return self.first.config

    def differences(self, other: Variant) -> dict[str, tuple[Any, Any]]:
        """Keys whose values differ, with this variant's and the other's; a key that one has not, as LLaMA no pattern, is none."""
        pairs = {key: (value, other.settings[key]) for key, value in self.settings.items() if key in other.settings}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def group_runs(runs: Sequence[RecordedRun]) -> tuple[Variant, ...]:
    """In the order of their first runs. Raises: RunFolderError for two runs of one variant with one seed."""
    groups: list[tuple[dict[str, Any], dict[int, RecordedRun]]] = []
    for run in runs:
        settings = settings_of(run.config)
        group = next((known for same, known in groups if same == settings), None)
        if group is None:
            groups.append((settings, group := {}))
        if run.seed in group:
            raise RunFolderError(
                f"{run.folder}: is the same run as {group[run.seed].folder}, with the same run.seed={run.seed}; leave one out"
            )
        group[run.seed] = run
    return _named([Variant(name="", settings=settings, runs=dict(sorted(group.items()))) for settings, group in groups])


def settings_of(config: Config) -> dict[str, Any]:
    """What is trained, by `section.key`: without what changes no number, and without what LLaMA does not have."""
    tree = recorded(config)
    flat = {
        f"{section}.{name}": value
        for section, values in tree.items()
        if section not in _SECTIONS_WITHOUT_EFFECT
        for name, value in values.items()
    }
    flat |= {"model.num_kv_heads": config.model.kv_heads, "depth.partial_sum_dtype": config.partial_sum_dtype}
    settings = {key: value for key, value in flat.items() if key not in _WITHOUT_EFFECT | _SETTLED}
    if config.depth.router != "none":
        return settings
    return {
        key: value
        for key, value in settings.items()
        if key == "depth.router" or not key.startswith(("depth.", "optim.router_"))
    }


def show_setting(key: str, value: Any) -> str:
    """A value on one line, shortened where it is long."""
    if key in ("data.train", "data.valid"):
        paths = [from_here(one["path"]) for one in value]
        shares = [f"{one['weight']:g} {path}" for one, path in zip(value, paths, strict=True)]
        value = " ".join(shares if len(value) > 1 else paths)
    elif key in ("data.tokenizer", "checkpoint.weights_from") and value is not None:
        value = from_here(value)
    return "none" if value is None else shown(value).strip("'")


def _named(variants: Sequence[Variant]) -> tuple[Variant, ...]:
    """By router and pattern; where these are the same, by the keys that differ among them, and last by folder."""
    named = []
    for variant in variants:
        alike = [other for other in variants if _depth_name(other.config) == _depth_name(variant.config)]
        named.append(replace(variant, name=", ".join([_depth_name(variant.config), *_telling(variant, alike)])))
    names = [variant.name for variant in named]
    return tuple(
        variant if names.count(variant.name) == 1 else replace(variant, name=f"{variant.name} ({variant.first.folder})")
        for variant in named
    )


def _depth_name(config: Config) -> str:
    depth = config.depth
    if depth.router == "none":
        return "LLaMA"
    kind = [
        "LIMe",
        *([depth.entry] if depth.entry != "kv" else []),
        *([depth.router] if depth.router != "static" else []),
    ]
    edges = depth.pattern_name or ("edges" if depth.pattern else "no edges")
    pattern = depth.pattern if isinstance(depth.pattern, str) else edges
    options = {key: getattr(depth, key) for key in options_of(ROUTINGS[depth.entry, depth.router])}
    unusual = [f"{key}={value}" for key, value in options.items() if value != getattr(DepthConfig(), key)]
    return ", ".join([" ".join(kind), pattern, *unusual])


def _telling(variant: Variant, alike: Sequence[Variant]) -> list[str]:
    keys = dict.fromkeys(key for other in alike for key in variant.differences(other))
    return [f"{key}={show_setting(key, variant.settings[key])}" for key in keys]
