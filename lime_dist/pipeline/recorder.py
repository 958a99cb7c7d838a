"""Times what one rank does in a step: each operation of its plan, each arrival, each collective. Knows no model.

Operations are those of the plan, in its order, and the next one begins where the last has ended: so one mark behind each is
the whole record of them, and nothing of a step is left out or counted twice.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lime_dist.pipeline.step_times import CollectiveTimes, StepTimes
from lime_dist.pipeline.transport import Channel, Link, Sent, Transport, Work
from lime_dist.plan.operations import Operation

# Of a ProcessGroup: what `torch.distributed`, megatron-core and DeepSpeed call, whatever they are called by. An older torch has
# not all of them.
_COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced",
    "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single", "reduce_scatter_tensor_coalesced",
    "alltoall", "alltoall_base", "all_to_all_single", "broadcast", "gather", "scatter", "barrier",
)  # fmt: skip


class Clock(Protocol):
    """mark: a moment, for `read` to tell when everything before it is done."""

    def mark(self) -> Any: ...

    def busy(self) -> int | None:
        """ns that this thread has had of a core."""

    def delayed(self) -> int | None:
        """ns for which this thread was ready to run and had no core."""

    def read(self, marks: Sequence[Any]) -> list[int]:
        """ns of `time.monotonic_ns`."""


class HostClock:
    """For a CPU, which has done what it was told to when a call returns."""

    mark = staticmethod(time.monotonic_ns)
    busy = staticmethod(time.thread_time_ns)

    def __init__(self) -> None:
        self._schedstat = _open_schedstat()
        if self._schedstat is not None:
            weakref.finalize(self, os.close, self._schedstat)

    def delayed(self) -> int | None:
        return None if self._schedstat is None else _schedstat(self._schedstat)[1]

    def read(self, marks: Sequence[int]) -> list[int]:
        return list(marks)


def _open_schedstat() -> int | None:
    """Of this thread; None where the kernel has none or does not count."""
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if _schedstat(file)[0] > 0:
        return file
    os.close(file)
    return None


def _schedstat(file: int) -> list[int]:
    """ns on a core, ns ready and without one, and slices (Documentation/scheduler/sched-stats.rst of Linux)."""
    return [int(number) for number in os.pread(file, 128, 0).split()]


class StreamClock:
    """For a GPU: events of the current stream, which lie on the host's clock by one moment at which the device was idle."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._zero = self.mark()
        torch.cuda.synchronize()
        self._zero_ns = time.monotonic_ns()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def busy(self) -> None:
        return None

    def delayed(self) -> None:
        return None

    def read(self, marks: Sequence[torch.cuda.Event]) -> list[int]:
        torch.cuda.synchronize()
        return [self._zero_ns + round(1e6 * self._zero.elapsed_time(event)) for event in marks]


def clock_of(device: torch.device) -> Clock:
    return StreamClock() if device.type == "cuda" else HostClock()


@dataclass
class _Marks:
    """Of the step that is being recorded."""

    process_busy: int = 0  # when it began
    marks: list[Any] = field(default_factory=list)
    busy: list[int | None] = field(default_factory=list)
    delayed: list[int | None] = field(default_factory=list)
    arrivals: list[_Arrival] = field(default_factory=list)
    collectives: list[_TimedWork] = field(default_factory=list)
    sent_bytes: tuple[int, int] = (0, 0)


class Recorder:
    """One rank's. Within `recording`, a step is `begin`, marks, `take`.

    device: whose clock is used, and on which messages arrive.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._clock = clock_of(device)
        self._step = _Marks()

    def begin(self) -> None:
        self._step = _Marks(process_busy=time.process_time_ns())
        self.mark()

    def mark(self) -> None:
        """What was being done is done."""
        self._step.marks.append(self._clock.mark())
        self._step.busy.append(self._clock.busy())
        self._step.delayed.append(self._clock.delayed())

    def follow(self, operations: Iterator[Operation]) -> Iterator[Operation]:
        """`operations`, with a mark behind each: who asks for the next one has carried out the last."""
        for operation in operations:
            yield operation
            self.mark()

    def count(self, forward: Sent, backward: Sent) -> None:
        """What the transport has sent in the step."""
        self._step.sent_bytes = forward.num_bytes, backward.num_bytes

    def take(self) -> StepTimes:
        """The step that ends here. On a GPU the host waits for it."""
        step, read = self._step, self._clock.read
        process_busy = time.process_time_ns() - step.process_busy
        busy = [count for count in step.busy if count is not None]
        delayed = [count for count in step.delayed if count is not None]
        return StepTimes(
            marks=read(step.marks),
            busy=busy or None,
            delayed=delayed or None,
            process_busy=process_busy,
            arrivals=read([arrival.mark for arrival in step.arrivals]),
            collectives=[
                CollectiveTimes(work.group_name, *read([work.entered, work.wait_begun, work.wait_ended]))
                for work in step.collectives
            ],
            sent_bytes=step.sent_bytes,
        )

    @contextmanager
    def recording(self, transport: Transport) -> Iterator[None]:
        """Arrivals over `transport` and all collectives of this process are timed within; between steps too, for nothing."""
        with ExitStack() as stack:
            for link in (transport.from_previous, transport.from_next):
                if link is not None:
                    stack.enter_context(self._watched(link))
            stack.enter_context(self._timed_collectives())
            yield

    # ---- arrivals

    @contextmanager
    def _watched(self, link: Link) -> Iterator[None]:
        watch = _StreamWatch(self._clock) if self._device.type == "cuda" else _ThreadWatch(self._clock)
        channel = link.channel
        link.channel = _WatchedChannel(channel, watch, self._note_arrival)
        try:
            yield
        finally:
            link.channel = channel
            watch.close()

    def _note_arrival(self, arrival: _Arrival) -> None:
        self._step.arrivals.append(arrival)

    # ---- collectives

    @contextmanager
    def _timed_collectives(self) -> Iterator[None]:
        """Patched where all of them pass, as megatron-core and DeepSpeed call theirs by names of their own."""
        found = {name: vars(ProcessGroup)[name] for name in _COLLECTIVES if name in vars(ProcessGroup)}
        for name in found:
            setattr(ProcessGroup, name, _timed(getattr(ProcessGroup, name), self._time_collective))
        try:
            yield
        finally:
            for name, collective in found.items():
                setattr(ProcessGroup, name, collective)

    def _time_collective(self, group: ProcessGroup, start: Callable[[], dist.Work | None]) -> dist.Work | None:
        entered = self._clock.mark()
        work = start()
        if work is None or group.size() == 1:  # a group of one waits for nobody
            return work
        timed = _TimedWork(work, group.group_name, entered, self._clock)
        self._step.collectives.append(timed)
        return timed  # type: ignore[return-value]  # it is one to all who are not C++


def _timed(collective: Callable[..., Any], time_it: Callable[..., Any]) -> Callable[..., Any]:
    def call(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        return time_it(group, partial(collective, group, *args, **kwargs))

    return call


class _TimedWork:
    """A collective's work, whose wait is timed."""

    def __init__(self, work: dist.Work, group_name: str, entered: Any, clock: Clock):
        self._work, self._clock, self.group_name, self.entered = work, clock, group_name, entered
        self.wait_begun = self.wait_ended = clock.mark()

    def wait(self, *args: Any) -> bool:
        self.wait_begun = self._clock.mark()
        result = self._work.wait(*args)
        self.wait_ended = self._clock.mark()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


@dataclass
class _Arrival:
    mark: Any = None


class _Watch(Protocol):
    """Marks the arrival of works that are waited for in the order in which they were posted."""

    def watch(self, work: Work, arrival: _Arrival) -> Work:
        """What to wait for in place of `work`."""

    def close(self) -> None: ...


@dataclass
class _WatchedChannel:
    """`note` hears of each receive when it is posted."""

    channel: Channel
    watch: _Watch
    note: Callable[[_Arrival], None]

    @property
    def peer(self) -> int:
        return self.channel.peer

    def send(self, tensor: Tensor) -> Work:
        return self.channel.send(tensor)

    def receive(self, tensor: Tensor) -> Work:
        arrival = _Arrival()
        self.note(arrival)
        return self.watch.watch(self.channel.receive(tensor), arrival)


class _ThreadWatch:
    """gloo tells of an arrival only to one who waits, so a thread does."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._posted: SimpleQueue[_Watched | None] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="arrivals").start()

    def watch(self, work: Work, arrival: _Arrival) -> Work:
        watched = _Watched(work, arrival)
        self._posted.put(watched)
        return watched

    def close(self) -> None:
        self._posted.put(None)

    def _run(self) -> None:
        while (watched := self._posted.get()) is not None:
            watched.arrive(self._clock)


class _Watched:
    """A receive that the thread waits for, and who needs it waits for the thread."""

    def __init__(self, work: Work, arrival: _Arrival):
        self._work, self._arrival = work, arrival
        self._error: Exception | None = None
        self._here = threading.Lock()
        self._here.acquire()

    def arrive(self, clock: Clock) -> None:
        try:
            self._work.wait()
        except Exception as error:
            self._error = error
        self._arrival.mark = clock.mark()
        self._here.release()

    def wait(self) -> bool:
        with self._here:
            if self._error is not None:
                raise self._error
        return True

    def is_completed(self) -> bool:
        return not self._here.locked()


class _StreamWatch:
    """On a GPU `wait` holds up the current stream alone: a stream beside it tells when a message has come."""

    def __init__(self, clock: Clock):
        self._clock, self._stream = clock, torch.cuda.Stream()

    def watch(self, work: Work, arrival: _Arrival) -> Work:
        with torch.cuda.stream(self._stream):
            work.wait()
            arrival.mark = self._clock.mark()
        return work

    def close(self) -> None:
        """Nothing is left of it."""
