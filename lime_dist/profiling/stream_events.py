"""A rank's computing, messages and collectives as a device's work, which is all that HolisticTraceAnalysis looks at. Pure data.

To it an event is a device's that has a `stream` above 0 and, as its `correlation`, that of the host's event that launched it; and
communication is what an NCCL kernel is the name of. So this tells it of ranks that ran without a GPU, or without torch.profiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import Cause
from lime_dist.profiling.trace_events import PIDS_OF_A_RANK, Event, RankEvents, Track, first_pid, name_process

_COMMUNICATION = "ncclDevKernel"
_FIRST_CORRELATION = 2**16  # it keeps numbers of rows in as many bits as correlations take


def stream_events(profile: Profile, events: RankEvents, rank: int) -> Iterator[Event]:
    pid = first_pid(rank) + PIDS_OF_A_RANK - 1
    launches = Track(pid, 1)
    yield from name_process(profile, rank, pid, "as streams")
    yield from launches.named("launches")
    for stream in range(1, 4):
        yield from Track(pid, 1 + stream).named(f"stream {stream}")
    computing = (event for event in events.operations() if event["cat"] == Cause.COMPUTE.value)
    works = chain(
        ((1, event["name"], event) for event in computing),
        ((2, f"{_COMMUNICATION}_SendRecv {event['name']}", event) for event in events.messages()),
        ((3, f"{_COMMUNICATION} {event['name']}", event) for event in events.collectives()),
    )
    for correlation, (stream, name, event) in enumerate(works, _FIRST_CORRELATION):
        launched = {"correlation": correlation}
        place = {"name": name, "cat": "kernel", "pid": pid, "tid": 1 + stream}
        yield launches.span("launch", "cuda_runtime", 0, 0, launched) | {"ts": event["ts"]}
        yield event | place | {"args": event["args"] | launched | {"stream": stream}}
