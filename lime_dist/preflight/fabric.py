"""The links between ranks, measured over the groups and the transport that training uses. Collective throughout.

Boundaries are measured one after the other, each by all its pairs of ranks at once, as they are busy in a step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lime_dist.backends.megatron import Groups
from lime_dist.pipeline.transport import Link, Transport
from lime_dist.plan.run_plan import RunPlan

MIN_MESSAGE_BYTES, MAX_MESSAGE_BYTES = 2**20, 64 * 2**20
_PROBE = "probe"  # what its messages carry
_SUMS = 3
_SUMMED_ELEMENTS = 2**18  # 1 MiB of fp32


class FabricFailed(RuntimeError):
    """A sum over the ranks is wrong: a defect of the machine or of its communication library."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """One rank's messages over one boundary. seconds: of one, the median; bytes_sent: of all that were timed."""

    boundary: int  # from this stage to the next
    direction: str  # forward | backward
    rank: int
    peer: int
    message_bytes: int
    bytes_sent: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.message_bytes / self.seconds


def message_bytes(bundle_bytes: int) -> int:
    """The bundle's own size, within what tells a bandwidth at all and takes no minute on a slow link."""
    return min(max(bundle_bytes, MIN_MESSAGE_BYTES), MAX_MESSAGE_BYTES)


def repetitions(size: int) -> int:
    """How often a message of `size` bytes is sent: small ones more often, since their time varies more."""
    return min(max(MAX_MESSAGE_BYTES // size, 3), 9)


def time_all_reduce(device: torch.device) -> float:
    """Seconds of a sum of 1 MiB over all ranks, the median. Collective: world. Raises: FabricFailed."""
    seconds = []
    for _ in range(1 + _SUMS):
        values = torch.full((_SUMMED_ELEMENTS,), float(dist.get_rank() + 1), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        _check_sum(values)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])  # the first opens the connections


def _check_sum(values: Tensor) -> None:
    world_size = dist.get_world_size()
    expected = world_size * (world_size + 1) / 2
    if not bool((values == expected).all()):
        raise FabricFailed(
            f"an all-reduce over {world_size} ranks gave {values.min()} to {values.max()}, not {expected}"
        )


def time_crossings(groups: Groups, plan: RunPlan, device: torch.device) -> list[Crossing]:
    """This rank's crossings as the sender. Collective: world."""
    transport = Transport.connect(groups, device)
    ends = _Ends(transport, groups.coordinate.pp_rank, len(plan.stages), device)
    found = []
    for boundary, boundary_bytes in enumerate(plan.boundary_bytes):
        for direction in ("forward", "backward"):
            dist.barrier()
            crossing = ends.cross(boundary, direction, message_bytes(boundary_bytes // plan.virtual_stages))
            found += [crossing] if crossing is not None else []
    return found


@dataclass(frozen=True)
class _Ends:
    """What one rank does when a boundary is measured: send, answer or stand by.

    The receiver answers each message with a byte over the other direction's link, so that one clock times all of it.
    """

    transport: Transport
    stage_index: int
    num_stages: int
    device: torch.device

    def cross(self, boundary: int, direction: str, size: int) -> Crossing | None:
        transport, is_forward = self.transport, direction == "forward"
        following = (boundary + 1) % self.num_stages
        before, after = (boundary, following) if is_forward else (following, boundary)
        if self.stage_index == before:
            out, back = (
                (transport.to_next, transport.from_next)
                if is_forward
                else (transport.to_previous, transport.from_previous)
            )
            assert out is not None and back is not None
            return self._send(boundary, direction, size, out, back)
        if self.stage_index == after:
            incoming, back = (
                (transport.from_previous, transport.to_previous)
                if is_forward
                else (transport.from_next, transport.to_next)
            )
            assert incoming is not None and back is not None
            self._answer(size, incoming, back)
        return None

    def _send(self, boundary: int, direction: str, size: int, out: Link, back: Link) -> Crossing:
        message = self._bytes(size)
        sent_before = out.bytes_sent
        seconds = median(self._send_one(message, out, back) for _ in range(repetitions(size)))
        return Crossing(
            boundary=boundary,
            direction=direction,
            rank=dist.get_rank(),
            peer=out.channel.peer,
            message_bytes=size,
            bytes_sent=out.bytes_sent - sent_before,
            seconds=seconds,
        )

    def _send_one(self, message: Tensor, out: Link, back: Link) -> float:
        started = time.perf_counter()
        out.send(message, _PROBE)
        answer = back.receive(self._bytes(1)).wait()
        answer.item()  # on a GPU only this waits for it
        out.flush()
        return time.perf_counter() - started

    def _answer(self, size: int, incoming: Link, back: Link) -> None:
        for _ in range(repetitions(size)):
            incoming.receive(self._bytes(size)).wait()
            back.send(self._bytes(1), _PROBE)
            back.flush()

    def _bytes(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.uint8, device=self.device)
