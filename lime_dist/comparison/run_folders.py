"""What a training run leaves in its folder that is compared: its config and its losses, with the FLOPs they took."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from lime_dist.comparison.curves import Curve, trailing_means
from lime_dist.config import RUN_CONFIG, Config, check_config, load_config
from lime_dist.errors import ConfigError
from lime_dist.plan.parameters import total_parameters
from lime_dist.plan.run_plan import plan_run
from lime_dist.training.records import read_records

METRICS = ("loss", "eval_loss")
_OF_STEPS = ("loss", "tokens_seen", "model_flops")


class RunFolderError(ConfigError):
    """A run's folder without what a comparison reads."""


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """losses, tokens (so far), flops (so far): after each step from the first on. evaluations: held-out loss by step."""

    folder: Path
    config: Config
    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    flops: tuple[int, ...]
    evaluations: Mapping[int, float]

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def num_steps(self) -> int:
        return len(self.losses)

    @property
    def is_finished(self) -> bool:
        return self.num_steps >= self.config.run.steps

    @property
    def has_evaluations(self) -> bool:
        return len(self.evaluations) > 1

    @cached_property
    def parameters(self) -> int:
        return total_parameters(self.config.model, self.config.pattern)

    @cached_property
    def flops_per_token(self) -> int:
        return plan_run(self.config).model_flops_per_token

    def curve(self, metric: str, window: int) -> Curve:
        """window: steps that a train loss is the mean of, up to its step; an evaluation is taken as it is.

        Raises: RunFolderError.
        """
        if metric == "loss":
            return self._curve(range(window, self.num_steps + 1), trailing_means(self.losses, window))
        if not self.has_evaluations:
            raise RunFolderError(
                f"{self.folder}: has {len(self.evaluations)} of the two evaluations that a curve needs; set data.valid, or compare "
                "by --metric loss"
            )
        return self._curve(list(self.evaluations), list(self.evaluations.values()))

    def _curve(self, steps: Sequence[int], losses: Sequence[float]) -> Curve:
        return Curve(
            steps=tuple(steps),
            tokens=tuple(self.tokens[step - 1] if step else 0 for step in steps),
            flops=tuple(self.flops[step - 1] if step else 0 for step in steps),
            losses=tuple(losses),
        )


def read_run(folder: Path) -> RecordedRun:
    """Raises: RunFolderError."""
    if not (folder / RUN_CONFIG).is_file():
        raise RunFolderError(
            f"{folder}: has no config.yaml; name the folder of a run (run.dir) that has begun to train"
        )
    try:
        config = check_config(load_config(folder / RUN_CONFIG))
    except ConfigError as error:
        raise RunFolderError(f"{folder}: its config.yaml cannot be read: {error}") from None
    records = read_records(folder / "metrics.jsonl")
    steps = _whole_steps(folder, {record["step"]: record for record in records if _is_step(record)})
    found = [record for record in records if _is_evaluation(record) and record["step"] <= len(steps)]
    evaluations = {record["step"]: record["eval_loss"] for record in sorted(found, key=lambda record: record["step"])}
    losses = _losses(steps, skipped={record["bad_step"] for record in records if record.get("spike") == "skipped"})
    _check_finite(folder, dict(enumerate(losses, 1)))
    _check_finite(folder, evaluations)
    return RecordedRun(
        folder=folder,
        config=config,
        losses=tuple(losses),
        tokens=tuple(step["tokens_seen"] for step in steps),
        flops=tuple(accumulate(step["model_flops"] for step in steps)),
        evaluations=evaluations,
    )


def _is_step(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step"), int) and all(name in record for name in _OF_STEPS)


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step"), int) and "eval_loss" in record


def _whole_steps(folder: Path, by_step: Mapping[int, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of all steps, ascending. Raises: RunFolderError where one is missing: FLOPs could not be summed up."""
    if not by_step:
        raise RunFolderError(
            f"{folder}: metrics.jsonl has no steps with loss, tokens_seen and model_flops; name a run that has trained, with this "
            "version, or leave it out"
        )
    missing = next((step for step in range(1, max(by_step)) if step not in by_step), None)
    if missing is not None:
        raise RunFolderError(
            f"{folder}: metrics.jsonl lacks step {missing}; a run that went on from another folder's checkpoint has its first "
            "steps there: put those lines before its own, or leave this run out"
        )
    return [by_step[step] for step in sorted(by_step)]


def _losses(steps: Sequence[Mapping[str, Any]], skipped: Collection[int]) -> list[float]:
    """Of a skipped step whose loss was not finite that of the step before: the weights are those."""
    losses: list[float] = []
    for step in steps:
        is_lost = step["loss"] is None and step["step"] in skipped and bool(losses)
        losses.append(losses[-1] if is_lost else step["loss"])
    return losses


def _check_finite(folder: Path, losses: Mapping[int, float | None]) -> None:
    bad = next((step for step, loss in losses.items() if loss is None), None)
    if bad is not None:
        raise RunFolderError(f"{folder}: the loss at step {bad} is not finite; leave this run out")
