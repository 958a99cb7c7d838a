"""How the loss of a run came down to its checkpoint, from its metrics.jsonl. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lime_dist.training.records import read_records

MAX_POINTS = 200


def loss_curve(checkpoint: Path, step: int) -> dict[str, list[list[float]]] | None:
    """[step, loss] up to `step`: `train`, means over equally many steps each, and `held_out`; None where there are no records."""
    run = checkpoint.absolute().parent.parent
    records = [record for record in read_records(run / "metrics.jsonl") if record.get("step", math.inf) <= step]
    train = [[record["step"], record["loss"]] for record in records if record.get("loss") is not None]
    held_out = [[record["step"], record["eval_loss"]] for record in records if record.get("eval_loss") is not None]
    return {"train": _thinned(train), "held_out": _thinned(held_out)} if train else None


def _thinned(points: list[list[float]]) -> list[list[float]]:
    """At most `MAX_POINTS`, each the last step and the mean loss of neighbours."""
    size = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [[group[-1][0], sum(loss for _, loss in group) / len(group)] for group in groups]


_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60


def curve_lines(curve: dict[str, Any]) -> list[str]:
    """The training loss as a row of bars, with its ends."""
    losses = [loss for _, loss in curve["train"]]
    places = [round(index * (len(losses) - 1) / (_WIDTH - 1)) for index in range(_WIDTH)]
    shown = [losses[place] for place in places] if len(losses) > _WIDTH else losses
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(_BARS[round((loss - low) * scale)] for loss in shown)
    return [f"training loss  {bars}  from {losses[0]:.2f} to {losses[-1]:.2f} at step {curve['train'][-1][0]:.0f}"]
