"""What a run that goes on does otherwise than the run that saved its checkpoint. Pure data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lime_dist.config import Config
from lime_dist.errors import CheckpointError, shown

# From here on other samples, or other arithmetic: no step would be what it is in a run that was never stopped.
BREAKING = (
    "data.train", "data.seq_length", "data.samples", "data.valid_fraction", "data.global_batch_size", "run.seed", "run.dtype",
    "depth.partial_sum_dtype",
)  # fmt: skip
_TOLD_SECTIONS = ("optim", "spikes")


@dataclass(frozen=True)
class Change:
    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {shown(self.before)} -> {shown(self.now)}"


def find_changes(saved: Config, config: Config) -> list[Change]:
    """Of keys that change what is computed; the model, edges and layout have rules of their own."""
    pairs = zip(_values(saved), _values(config), strict=True)
    return [Change(key, before, now) for (key, before), (_, now) in pairs if before != now]


def require_same_run(folder: Path, saved: Config, config: Config, *, step: int) -> None:
    """step: done. Raises: CheckpointError for a change that breaks the run and that `checkpoint.allow_changes` does not name."""
    if config.run.steps < step:
        raise CheckpointError(
            f"run.steps: {config.run.steps}, but checkpoint {folder} has {step} steps done; set more, or name another run.dir"
        )
    for change in find_changes(saved, config):
        if change.key in BREAKING and change.key not in config.checkpoint.allow_changes:
            raise CheckpointError(
                f"{change.key}: {shown(change.now)}, but the run of checkpoint {folder} has {shown(change.before)}; set that, or to "
                f"go on with other numbers add checkpoint.allow_changes=[{change.key}]"
            )


def _values(config: Config) -> Iterator[tuple[str, Any]]:
    tree = asdict(config)
    for key in BREAKING:
        section, name = key.split(".")
        yield key, tree[section][name] if key != "data.train" else _blend(config)
    for section in _TOLD_SECTIONS:
        yield from ((f"{section}.{name}", value) for name, value in tree[section].items())
    yield "run.steps", config.run.steps


def _blend(config: Config) -> str:
    """Token files may lie elsewhere by now."""
    return ", ".join(f"{Path(source.path).name} x {source.weight:g}" for source in config.data.train)
