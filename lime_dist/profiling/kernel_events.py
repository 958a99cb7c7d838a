"""A rank's torch.profiler trace, put on the clock of ours. Pure data."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lime_dist.errors import one_line
from lime_dist.profiling.profile_files import Profile, ProfileError, kernels_file
from lime_dist.profiling.trace_events import Event, TraceClock, first_pid, metadata, name_process

_FLOW_IDS = 10**10  # of a rank; ours are few


@dataclass(frozen=True)
class KernelEvents:
    """names: of processes and threads. devices: as torch.profiler describes them."""

    names: list[Event] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    devices: list[Any] = field(default_factory=list)

    @property
    def has_streams(self) -> bool:
        return any("stream" in event.get("args", ()) for event in self.events)


def read_kernels(profile: Profile, clock: TraceClock, rank: int) -> KernelEvents:
    """None where the profile was recorded without. Raises: ProfileError."""
    path = kernels_file(profile.folder, rank)
    if not path.is_file():
        return KernelEvents()
    try:
        with gzip.open(path) as file:
            trace = json.load(file)
        return _Shifted(profile, clock, rank, trace).read()
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise ProfileError(f"{path}: not a whole trace ({one_line(error)}); record it again") from None


class _Shifted:
    def __init__(self, profile: Profile, clock: TraceClock, rank: int, trace: Event):
        self._profile, self._clock, self._rank, self._trace = profile, clock, rank, trace
        self._pids: dict[int, int] = {}

    def read(self) -> KernelEvents:
        events = list(self._events())
        return KernelEvents(list(self._names()), events, self._trace.get("deviceProperties", []))

    def _events(self) -> Iterator[Event]:
        """Those since the first step began, without what torch.profiler tells of itself, whose process is no number."""
        for event in self._trace["traceEvents"]:
            if event["ph"] in "Xsf" and isinstance(event["pid"], int):
                begin = self._moment(event["ts"])
                if begin >= 0:
                    yield self._shifted(event, begin)

    def _shifted(self, event: Event, begin: int) -> Event:
        changed: Event = {"pid": self._pid(event["pid"]), "ts": begin / 1000}
        if event["ph"] == "X":
            changed["dur"] = (self._moment(event["ts"] + event["dur"]) - begin) / 1000
        else:
            changed["id"] = event["id"] + first_pid(self._rank) * _FLOW_IDS
        return event | changed

    def _moment(self, microseconds: float) -> int:
        epoch_ns = self._trace["baseTimeNanoseconds"] + round(microseconds * 1000)
        return self._clock.on_rank(self._profile.ranks[self._rank], epoch_ns)

    def _pid(self, pid: int) -> int:
        return self._pids.setdefault(pid, first_pid(self._rank) + 1 + len(self._pids))

    def _names(self) -> Iterator[Event]:
        """Of the processes that have events: torch.profiler's own is that of the host, and one of each device it has seen."""
        for event in self._trace["traceEvents"]:
            if event["ph"] != "M" or event["pid"] not in self._pids:
                continue
            pid = self._pids[event["pid"]]
            if event["name"] == "process_labels":
                yield from name_process(self._profile, self._rank, pid, f"torch.profiler {event['args']['labels']}")
            elif event["name"].startswith("thread_"):
                yield metadata(pid, event["name"], event["args"], event["tid"])
