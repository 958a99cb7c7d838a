"""Moves messages between neighbouring stages and counts them. Knows no model and no schedule.

Each direction of a boundary has a process group of its own and keeps the order in which messages are sent, so sends and
receives pair up without tags.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class Work(Protocol):
    """A message under way: torch's, or what stands for it."""

    def wait(self) -> Any: ...
    def is_completed(self) -> bool: ...


@dataclass
class Incoming:
    """A tensor being received; usable after `wait`."""

    tensor: Tensor
    work: Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.tensor


class PipelineGroups(Protocol):
    """Over the same pipeline, ranks in stage order; the last two are None where nothing goes from the last stage to the first."""

    @property
    def pp_forward(self) -> ProcessGroup: ...
    @property
    def pp_backward(self) -> ProcessGroup: ...
    @property
    def wrap_forward(self) -> ProcessGroup | None: ...
    @property
    def wrap_backward(self) -> ProcessGroup | None: ...


class Channel(Protocol):
    """One direction of one boundary: messages arrive in the order in which they are sent. Counts nothing."""

    @property
    def peer(self) -> int:
        """Global rank."""

    def send(self, tensor: Tensor) -> Work:
        """Start sending a contiguous tensor, which must not change until the work is done."""

    def receive(self, tensor: Tensor) -> Work:
        """Start receiving into a contiguous tensor."""


@dataclass
class GroupChannel:
    """A channel over a process group, which this rank is in, that serves this direction alone."""

    group: ProcessGroup
    peer: int

    def send(self, tensor: Tensor) -> Work:
        return dist.isend(tensor, self.peer, group=self.group)  # type: ignore[return-value]  # None outside the group

    def receive(self, tensor: Tensor) -> Work:
        return dist.irecv(tensor, self.peer, group=self.group)  # type: ignore[return-value]


@dataclass(frozen=True)
class Sent:
    """messages: their number, by what they carry."""

    num_bytes: int = 0
    messages: Counter[str] = field(default_factory=Counter)


@dataclass
class Link:
    """A channel seen from one end, with what is under way on it."""

    channel: Channel
    bytes_sent: int = 0
    messages_sent: Counter[str] = field(default_factory=Counter)  # by what they carry
    _in_flight: list[tuple[Work, Tensor]] = field(default_factory=list)

    def send(self, tensor: Tensor, cargo: str) -> None:
        """Start sending; the tensor must not be written to until `flush`."""
        tensor = tensor.detach().contiguous()
        self._in_flight = [(work, kept) for work, kept in self._in_flight if not work.is_completed()]
        self._in_flight.append((self.channel.send(tensor), tensor))
        self.bytes_sent += tensor.numel() * tensor.element_size()
        self.messages_sent[cargo] += 1

    def receive(self, tensor: Tensor) -> Incoming:
        """Start receiving into a contiguous tensor."""
        return Incoming(tensor, self.channel.receive(tensor))

    def take_sent(self) -> Sent:
        """What was sent since the last call."""
        sent = Sent(self.bytes_sent, self.messages_sent)
        self.bytes_sent, self.messages_sent = 0, Counter()
        return sent

    def flush(self) -> None:
        """Wait until everything sent has left."""
        for work, _ in self._in_flight:
            work.wait()
        self._in_flight.clear()


@dataclass(frozen=True)
class Transport:
    """The links of one stage; None where there is no neighbour. With virtual stages the first is the last one's next."""

    from_previous: Link | None
    to_previous: Link | None
    from_next: Link | None
    to_next: Link | None

    @classmethod
    def connect(cls, groups: PipelineGroups, device: torch.device) -> Transport:
        """Collective: pp group."""
        stage_index, num_stages = dist.get_rank(groups.pp_forward), dist.get_world_size(groups.pp_forward)
        before = groups.wrap_forward if stage_index == 0 else groups.pp_forward
        before_backward = groups.wrap_backward if stage_index == 0 else groups.pp_backward
        behind = groups.wrap_forward if stage_index == num_stages - 1 else groups.pp_forward
        behind_backward = groups.wrap_backward if stage_index == num_stages - 1 else groups.pp_backward
        transport = cls(
            from_previous=_link(before, stage_index - 1),
            to_previous=_link(before_backward, stage_index - 1),
            from_next=_link(behind_backward, stage_index + 1),
            to_next=_link(behind, stage_index + 1),
        )
        transport.open_boundaries(stage_index, device)
        return transport

    def open_boundaries(self, stage_index: int, device: torch.device) -> None:
        """One byte, which is not counted, over every channel. Collective: pp group.

        NCCL connects two ranks at their first operation and holds both hosts until each has come to it. In a step, a
        receive posted ahead would so hold a stage before it sends what its neighbour waits for. Here no two ranks wait
        for a third, but around a ring of an odd number, where the last one waits for the first: the boundaries behind even
        stages open first, then the others, and each forward, then backward.
        """
        behind, before = [], []
        if self.to_next is not None and self.from_next is not None:
            behind = [self.to_next.channel.send, self.from_next.channel.receive]
        if self.from_previous is not None and self.to_previous is not None:
            before = [self.from_previous.channel.receive, self.to_previous.channel.send]
        for pass_one in behind + before if stage_index % 2 == 0 else before + behind:
            pass_one(torch.zeros(1, dtype=torch.uint8, device=device)).wait()

    def flush(self) -> None:
        for link in (self.to_previous, self.to_next):
            if link is not None:
                link.flush()

    def take_sent(self) -> tuple[Sent, Sent]:
        """What was sent (forward, backward) since the last call."""
        forward, backward = (Sent() if link is None else link.take_sent() for link in (self.to_next, self.to_previous))
        return forward, backward


def _link(group: ProcessGroup | None, stage_index: int) -> Link | None:
    """To or from a stage of this pipeline, counted around it."""
    if group is None:
        return None
    return Link(GroupChannel(group, dist.get_global_rank(group, stage_index % dist.get_world_size(group))))


class ResidualShare:
    """This rank's share of a residual that the tensor group holds whole, and the whole from the shares.

    Without sequence parallelism the residual is the same on every tensor rank, so each sends 1/tp of it.
    """

    def __init__(self, group: ProcessGroup, sequence_parallel: bool):
        self._group = group
        self._whole = not sequence_parallel and dist.get_world_size(group) > 1

    def share(self, residual: Tensor) -> Tensor:
        if not self._whole:
            return residual
        return residual.chunk(dist.get_world_size(self._group))[dist.get_rank(self._group)]

    def whole(self, share: Tensor) -> Tensor:
        """Collective: tp group."""
        if not self._whole:
            return share
        rows = share.shape[0] * dist.get_world_size(self._group)
        residual = torch.empty(rows, *share.shape[1:], dtype=share.dtype, device=share.device)
        dist.all_gather_into_tensor(residual, share, group=self._group)
        return residual
