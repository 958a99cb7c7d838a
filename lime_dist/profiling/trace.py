"""Writes a profile as a trace that Perfetto, chrome://tracing and HolisticTraceAnalysis read."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO

from lime_dist.errors import ConfigError
from lime_dist.profiling.kernel_events import read_kernels
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.stream_events import stream_events
from lime_dist.profiling.timeline import StepTimeline
from lime_dist.profiling.trace_events import Event, RankEvents, TraceClock

_SUFFIXES = (".json", ".json.gz")


def write_trace(profile: Profile, timelines: Sequence[StepTimeline], path: str) -> tuple[Path, ...]:
    """The files written: `path`, or where that is a folder or ends with /, one of each rank in it, for HolisticTraceAnalysis.

    Raises: ConfigError, ProfileError.
    """
    writer = _TraceWriter(profile, timelines)
    target = Path(path)
    is_folder = path.endswith("/") or target.is_dir()
    if not is_folder and not target.name.endswith(_SUFFIXES):
        raise ConfigError(
            f"--trace: {path}: name a file that ends with .json or .json.gz, or a folder with / behind it"
        )
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"--trace: there is no folder {target.parent}; make it first")
    try:
        return writer.write_folder(target) if is_folder else (writer.write_file(target),)
    except OSError as error:
        raise ConfigError(f"--trace: {path}: {error.strerror or error}; name a place that can be written") from None


class _TraceWriter:
    def __init__(self, profile: Profile, timelines: Sequence[StepTimeline]):
        self._profile, self._timelines = profile, timelines
        self._clock = TraceClock(profile)

    def write_file(self, path: Path) -> Path:
        ranks = range(len(self._profile.ranks))
        events = chain.from_iterable(self._events_of(rank) for rank in ranks)
        return self._write(path, {}, events)

    def write_folder(self, folder: Path) -> tuple[Path, ...]:
        paths = [folder / f"rank_{record.rank}.json.gz" for record in self._profile.ranks]
        folder.mkdir(exist_ok=True)
        others = sorted(other.name for suffix in _SUFFIXES for other in set(folder.glob(f"*{suffix}")) - set(paths))
        if others:
            raise ConfigError(
                f"--trace: {folder} holds {others[0]}, which would be read as a rank's; name another folder"
            )
        return tuple(self._write_rank(rank, path) for rank, path in enumerate(paths))

    def _write_rank(self, rank: int, path: Path) -> Path:
        """Without arrows, as their other ends are in other files."""
        ours, kernels = self._rank_events(rank), read_kernels(self._profile, self._clock, rank)
        streams = [] if kernels.has_streams else list(stream_events(self._profile, ours, rank))
        spans = chain(_spans(ours), kernels.events, streams)
        head = {
            "distributedInfo": {"rank": rank, "world_size": len(self._profile.ranks)},
            "deviceProperties": kernels.devices,
        }
        return self._write(path, head, chain(ours.names(), kernels.names, _sorted(spans)))

    def _events_of(self, rank: int) -> Iterator[Event]:
        ours, kernels = self._rank_events(rank), read_kernels(self._profile, self._clock, rank)
        yield from ours.names()
        yield from kernels.names
        yield from _sorted(chain(_spans(ours), ours.flows(), kernels.events))

    def _rank_events(self, rank: int) -> RankEvents:
        return RankEvents(self._profile, self._timelines, self._clock, rank)

    def _write(self, path: Path, head: Event, events: Iterable[Event]) -> Path:
        head = {"schemaVersion": 1, "displayTimeUnit": "ms", "baseTimeNanoseconds": self._clock.zero_epoch_ns, **head}
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            with _open(unfinished, is_compressed=path.suffix == ".gz") as file:
                file.writelines(_lines(head, events))
            os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        return path


def _spans(ours: RankEvents) -> Iterator[Event]:
    return chain(ours.steps(), ours.operations(), ours.messages(), ours.collectives())


def _sorted(events: Iterable[Event]) -> list[Event]:
    """By time; at one moment what encloses others comes first, and arrows, which belong to what has begun, last."""
    return sorted(events, key=lambda event: (event.get("ts", -1), event["ph"] != "X", -event.get("dur", 0)))


def _open(path: Path, *, is_compressed: bool) -> IO[str]:
    return gzip.open(path, "wt", compresslevel=6) if is_compressed else open(path, "w")


def _lines(head: Event, events: Iterable[Event]) -> Iterator[str]:
    """An event a line. HolisticTraceAnalysis finds a file's rank by the blank behind the colon."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    yield f'{json.dumps(head)[:-1]}, "traceEvents": ['
    separator = "\n"
    for event in events:
        yield separator + encode(event)
        separator = ",\n"
    yield "\n]}\n"
