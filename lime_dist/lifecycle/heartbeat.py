"""The file in which a rank shows that it lives: RUN/heartbeat/rank_00003.json. Judges nothing; needs no torch.

Those of `lime-dist eval` and `profile` lie in folders of their own below it: the run may be training meanwhile.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lime_dist.layout import Coordinate
from lime_dist.lifecycle.pulse import Pass

CLOCK_SKEW = 5.0  # seconds by which hosts' clocks may differ


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a rank says of itself; times are seconds since the epoch on its own host's clock."""

    global_rank: int
    coordinate: Coordinate
    host: str
    pid: int
    job: str | None  # SLURM's
    step: int
    phase: str
    at: Pass | None  # of forward and backward
    busy: bool  # inside of the phase, not behind it
    done: int  # pieces of work finished
    moved: float  # the last beat
    alive: float  # this writing
    ended: bool  # the rank has left by itself
    passes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)  # finished, by kind and chunk
    awaits: str | None = None  # the kind of pass whose input has not come
    awaited: Pass | None = None  # that pass


def heartbeat_folder(run_dir: Path) -> Path:
    return run_dir / "heartbeat"


def side_heartbeat_folder(run_dir: Path, command: str) -> Path:
    """Of a command beside the run's training: eval, profile."""
    return heartbeat_folder(run_dir) / command


def write_heartbeat(folder: Path, heartbeat: Heartbeat) -> None:
    """Replace the rank's file in one step. Raises: OSError."""
    path = _path(folder, heartbeat.global_rank)
    place = heartbeat.coordinate
    values = asdict(heartbeat) | {
        "coordinate": {"pp": place.pp_rank, "dp": place.dp_rank, "tp": place.tp_rank},
        "at": heartbeat.at and heartbeat.at._asdict(),
        "awaited": heartbeat.awaited and heartbeat.awaited._asdict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    replacement = path.with_suffix(".tmp")
    replacement.write_text(json.dumps(values))
    os.replace(replacement, path)


def read_heartbeats(folder: Path, world_size: int) -> list[Heartbeat | None]:
    """By global rank; None where there is no file, or none that can be read."""
    return [_read(_path(folder, rank)) for rank in range(world_size)]


def written_since(heartbeats: Sequence[Heartbeat | None], start: float) -> list[Heartbeat | None]:
    """Without those that a start of the run before the one at `start`, in seconds since the epoch, left behind."""
    return [beat if beat is not None and beat.alive > start - CLOCK_SKEW else None for beat in heartbeats]


def _path(folder: Path, global_rank: int) -> Path:
    return folder / f"rank_{global_rank:05d}.json"


def _read(path: Path) -> Heartbeat | None:
    try:
        values = json.loads(path.read_text())
        place = {f"{axis}_rank": index for axis, index in values["coordinate"].items()}
        passes = {kind: {int(chunk): n for chunk, n in of_kind.items()} for kind, of_kind in values["passes"].items()}
        at, awaited = (value and Pass(**value) for value in (values["at"], values["awaited"]))
        return Heartbeat(**values | {"coordinate": Coordinate(**place), "at": at, "passes": passes, "awaited": awaited})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
