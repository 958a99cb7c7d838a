"""The paths that a config names. Written down they are absolute, so that they lead to the same files from any working folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lime_dist.config.schema import Config, Source

_EDGES = "edges:"  # a pattern of `depth.switch_at` that is a file until its step


def with_absolute_paths(config: Config) -> Config:
    """Relative ones count from the working folder."""
    data, depth, checkpoint = config.data, config.depth, config.checkpoint
    resume = checkpoint.resume
    return replace(
        config,
        data=replace(
            data, train=_sources(data.train), valid=_sources(data.valid), tokenizer=_absolute_or_none(data.tokenizer)
        ),
        depth=replace(
            depth,
            weights_from=_absolute_or_none(depth.weights_from),
            switch_at={step: _pattern(pattern) for step, pattern in depth.switch_at.items()},
        ),
        checkpoint=replace(
            checkpoint,
            weights_from=_absolute_or_none(checkpoint.weights_from),
            resume=resume if resume in ("auto", "never") else _absolute(resume),
        ),
        run=replace(config.run, dir=_absolute(config.run.dir)),
    )


def from_here(path: str) -> str:
    """As messages show it: relative where it is below the working folder."""
    return str(Path(path).relative_to(Path.cwd())) if Path(path).is_relative_to(Path.cwd()) else path


def _absolute(path: str) -> str:
    return str(Path.cwd() / path)


def _absolute_or_none(path: str | None) -> str | None:
    return None if path is None else _absolute(path)


def _sources(sources: list[Source]) -> list[Source]:
    return [replace(source, path=_absolute(source.path)) for source in sources]


def _pattern(pattern: str | dict[int, list[int]]) -> str | dict[int, list[int]]:
    if not isinstance(pattern, str) or not pattern.startswith(_EDGES):
        return pattern
    return f"{_EDGES}{_absolute(pattern.removeprefix(_EDGES))}"
