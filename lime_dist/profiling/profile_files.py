"""A profile's folder: `config.yaml`, `profile.json`, and for each rank `rank_N.safetensors`, with profile.kernels
`rank_N.kernels.json.gz` beside it. Pure data, no torch.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lime_dist.config import check_config, dump_yaml, load_config
from lime_dist.data.output_files import with_usual_rights
from lime_dist.errors import ConfigError, LimeDistError, one_line
from lime_dist.pipeline.step_times import PHASES, CollectiveTimes, StepTimes
from lime_dist.plan.operations import Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.profiling.clock_offset import ClockOffset

VERSION = 2
_ARRAYS = ("marks", "busy", "delayed", "process_busy", "arrivals", "collectives", "sent_bytes")
_HEAD, _CONFIG = "profile.json", "config.yaml"


class ProfileError(ConfigError):
    """A profile that is missing, cut short or of another version."""


@dataclass(frozen=True, kw_only=True)
class RankRecord:
    """What one rank recorded.

    host, device: names. cores: that this rank's host has for its ranks; None on a GPU. threads: that torch computes with.
    offsets: of its clock to rank 0's, before the first step and behind the last. epoch_ns: what to add to its clock for the
    time of day. group_ranks: global ranks of each group of its collectives.
    """

    rank: int
    host: str
    device: str
    cores: int | None
    threads: int
    offsets: tuple[ClockOffset, ClockOffset]
    epoch_ns: int
    group_ranks: Mapping[str, tuple[int, ...]]
    steps: tuple[StepTimes, ...]

    def on_first_clock(self, moment: int) -> float:
        """`moment` of this rank's clock in ns of rank 0's."""
        before, after = self.offsets
        if after.at == before.at:
            return moment - before.ahead
        share = (moment - before.at) / (after.at - before.at)
        return moment - before.ahead - share * (after.ahead - before.ahead)


@dataclass(frozen=True, kw_only=True)
class MeasuredLink:
    """What one way of a boundary carried alone, before the first recorded step; the slowest pair of ranks counts."""

    from_stage: int
    to_stage: int
    bytes_per_second: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A whole profile. steps: as metrics.jsonl numbers them, from 1. ranks: by global rank."""

    folder: Path
    plan: RunPlan
    steps: tuple[int, ...]
    ranks: tuple[RankRecord, ...]
    links: tuple[MeasuredLink, ...] = field(default=())

    def only(self, index: int) -> Profile:
        """Of one of its steps."""
        ranks = tuple(replace(rank, steps=(rank.steps[index],)) for rank in self.ranks)
        return replace(self, steps=(self.steps[index],), ranks=ranks)

    @property
    def num_marks(self) -> int:
        """All that was recorded of operations."""
        return sum(len(step.marks) for rank in self.ranks for step in rank.steps)

    @cached_property
    def clock_error_seconds(self) -> float:
        """Of the rank whose clock is known worst."""
        return max(offset.error for rank in self.ranks for offset in rank.offsets) / 1e9

    @cached_property
    def largest_drift(self) -> float:
        """Seconds a second."""
        return max(abs(_drift(rank)) for rank in self.ranks)


def _drift(rank: RankRecord) -> float:
    before, after = rank.offsets
    return (after.ahead - before.ahead) / (after.at - before.at) if after.at != before.at else 0.0


def profile_folder(run_dir: Path, first: int, last: int) -> Path:
    return run_dir / "profile" / f"steps_{first}-{last}"


# ---- writing


def clear(folder: Path) -> None:
    """A folder to write into; until `write_head`, what an earlier recording has left there is no profile."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _HEAD).unlink(missing_ok=True)


def write_head(folder: Path, plan: RunPlan, steps: Sequence[int], links: Sequence[MeasuredLink]) -> None:
    head = {
        "version": VERSION,
        "steps": list(steps),
        "links": [asdict(link) for link in links],
    }
    _replace(folder / _CONFIG, lambda path: path.write_text(dump_yaml(plan.config)))
    _replace(folder / _HEAD, lambda path: path.write_text(json.dumps(head)))


def write_rank(folder: Path, record: RankRecord) -> None:
    names = sorted(record.group_ranks)
    about = {key: value for key, value in vars(record).items() if key not in ("steps", "group_ranks", "offsets")}
    about |= {"offsets": [list(astuple(offset)) for offset in record.offsets]}
    about |= {"groups": [[name, list(record.group_ranks[name])] for name in names]}
    collectives = [
        [index, names.index(each.group_name), each.entered, each.wait_begun, each.wait_ended]
        for index, step in enumerate(record.steps)
        for each in step.collectives
    ]
    arrays = {
        "marks": _int64([step.marks for step in record.steps]),
        "busy": _int64([step.busy or [] for step in record.steps]),
        "delayed": _int64([step.delayed or [] for step in record.steps]),
        "arrivals": _int64([step.arrivals for step in record.steps]),
        "collectives": _int64(collectives).reshape(-1, 5),
        "process_busy": _int64([step.process_busy for step in record.steps]),
        "sent_bytes": _int64([step.sent_bytes for step in record.steps]),
    }
    _replace(_rank_file(folder, record.rank), lambda path: save_file(arrays, path, {"rank": json.dumps(about)}))


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"


def kernels_file(folder: Path, rank: int) -> Path:
    """Chrome trace of torch.profiler, of a profile recorded with profile.kernels."""
    return folder / f"rank_{rank}.kernels.json.gz"


def _int64(rows: Sequence[Any]) -> numpy.ndarray:
    return numpy.array(rows, dtype=numpy.int64)


def _replace(path: Path, write: Any) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    with with_usual_rights(unfinished):
        write(unfinished)
    os.replace(unfinished, path)


# ---- reading


def find_profile(path: Path) -> Path:
    """The profile's folder at `path`, or the newest one of the run there. Raises: ProfileError."""
    unreadable = next(
        (one for one in (path, path / "profile") if one.is_dir() and not os.access(one, os.R_OK | os.X_OK)), None
    )
    if unreadable is not None:
        raise ProfileError(f"{unreadable}: permission denied; ask its owner for the right to read it")
    if (path / _HEAD).is_file():
        return path
    found = sorted((path / "profile").glob(f"*/{_HEAD}"), key=lambda head: head.stat().st_mtime)
    if not found:
        raise ProfileError(
            f"{path}: no profile there; make one with `lime-dist profile CONFIG`, or train with profile.steps=[10,19]"
        )
    return found[-1].parent


def read_profile(path: Path) -> Profile:
    """Of a profile's folder, or the newest of a run's. Raises: ProfileError."""
    folder = find_profile(path)
    try:
        head = json.loads((folder / _HEAD).read_text())
        if head["version"] != VERSION:
            raise ProfileError(f"{folder}: written by another version of lime-dist; record it again")
        if not (folder / _CONFIG).read_bytes().endswith(b"\n"):  # YAML that is cut short may be YAML still
            raise ProfileError(f"{folder}: not a whole profile ({_CONFIG} is cut short); record it again")
        config = load_config(folder / _CONFIG, ())
        plan = plan_run(check_config(config, config.layout.world_size))
        ranks = tuple(_read_rank(folder, rank) for rank in range(plan.layout.world_size))
        links = tuple(_link(**link) for link in head["links"])
        steps = tuple(map(_whole, head["steps"]))
        profile = Profile(folder=folder, plan=plan, steps=steps, ranks=ranks, links=links)
    except ProfileError:
        raise
    except _DAMAGE as error:
        raise ProfileError(f"{folder}: not a whole profile ({one_line(error)}); record it again") from None
    _check(profile)
    return profile


# What reading what is not as it was written may raise.
_DAMAGE = (
    OSError, LimeDistError, SafetensorError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError,
)  # fmt: skip


def _link(*, from_stage: object, to_stage: object, bytes_per_second: object) -> MeasuredLink:
    if not isinstance(bytes_per_second, int | float):
        raise TypeError(f"{bytes_per_second!r} is no bandwidth")
    return MeasuredLink(from_stage=_whole(from_stage), to_stage=_whole(to_stage), bytes_per_second=bytes_per_second)


def _read_rank(folder: Path, rank: int) -> RankRecord:
    with safe_open(_rank_file(folder, rank), framework="numpy") as file:
        about = json.loads(file.metadata()["rank"])
        arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    groups = [(_text(name), tuple(map(_whole, ranks))) for name, ranks in about["groups"]]
    _check_arrays(arrays, len(groups))
    before, after = (ClockOffset(*map(_whole, offset)) for offset in about["offsets"])
    if abs(after.ahead - before.ahead) > abs(after.at - before.at):
        raise ValueError("a clock that ran backwards")
    if about["rank"] != rank:
        raise ValueError("a file of another rank")
    return RankRecord(
        rank=rank,
        host=_text(about["host"]),
        device=_text(about["device"]),
        cores=None if about["cores"] is None else _count(about["cores"]),
        threads=_count(about["threads"]),
        offsets=(before, after),
        epoch_ns=_whole(about["epoch_ns"]),
        group_ranks=dict(groups),
        steps=tuple(_steps({name: array.tolist() for name, array in arrays.items()}, [name for name, _ in groups])),
    )


def _steps(arrays: Mapping[str, list[Any]], group_names: Sequence[str]) -> Iterator[StepTimes]:
    collectives: dict[int, list[CollectiveTimes]] = defaultdict(list)
    for index, group, *times in arrays["collectives"]:
        collectives[index].append(CollectiveTimes(group_names[group], *times))
    rows = zip(
        *(arrays[name] for name in ("marks", "busy", "delayed", "process_busy", "arrivals", "sent_bytes")), strict=True
    )
    for index, (marks, busy, delayed, process_busy, arrivals, (forward, backward)) in enumerate(rows):
        yield StepTimes(
            marks=marks,
            busy=busy or None,
            delayed=delayed or None,
            process_busy=process_busy,
            arrivals=arrivals,
            collectives=collectives[index],
            sent_bytes=(forward, backward),
        )


# ---- what is read is checked


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or abs(value) >= 2**63:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _count(value: object) -> int:
    if _whole(value) < 1:
        raise ValueError(f"{value!r} is no number of cores or threads")
    return _whole(value)


def _check_arrays(arrays: Mapping[str, numpy.ndarray], num_groups: int) -> None:
    """Raises: ValueError."""
    marks, collectives, num_steps = arrays["marks"], arrays["collectives"], len(arrays["marks"])
    shapes = {name: array.shape for name, array in arrays.items()}
    fit = (
        all(array.dtype == numpy.int64 for array in arrays.values())
        and (marks.ndim, arrays["arrivals"].ndim, collectives.shape[1:]) == (2, 2, (5,))
        and all(shapes[name] in (marks.shape, (num_steps, 0)) for name in ("busy", "delayed"))
        and (shapes["process_busy"], shapes["sent_bytes"]) == ((num_steps,), (num_steps, 2))
        and (marks[:, 1:] >= marks[:, :-1]).all()
        and ((collectives[:, :2] >= 0) & (collectives[:, :2] < (num_steps, num_groups))).all()
    )
    if not fit:
        raise ValueError("times that do not fit together")


def _check(profile: Profile) -> None:
    """Raises: ProfileError."""
    layout = profile.plan.layout
    for record in profile.ranks:
        stage = profile.plan.stages[layout.coordinate(record.rank).pp_rank]
        operations = list(stage.operations(stage.actions))
        receives = sum(operation.verb is Verb.RECEIVE for operation in operations)
        expected = (2 + len(operations) + len(PHASES), receives)
        is_same = all((len(step.marks), len(step.arrivals)) == expected for step in record.steps)
        strangers = {rank for ranks in record.group_ranks.values() for rank in ranks} - {*range(layout.world_size)}
        if not is_same or strangers or not len(record.steps) == len(profile.steps) > 0:
            raise ProfileError(f"{profile.folder}: rank {record.rank} recorded another plan; record it again")
