"""What crosses a hop as messages: each is addressed, has a size, leaves at a known point of one pass and is needed at a known
point of another. Pure data.

Points follow from what the passes do. Forward, a layer leaves its entry as soon as it has projected its input, so that the
entry is on its way while the layer and those behind it run; sums over the chunk's own entries are whole behind its layers, and
each is needed when its reader has projected. Backward, the gradient of a sum is there when its reader has gone back, and that
of an entry is needed when the walk is back at the layer that made it. What leaves at one point for one point is one message,
and so is what would be too small alone: a message costs time of its own, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal, NamedTuple

from lime_dist.plan.schedule import Kind
from lime_dist.plan.shape import BundleShape
from lime_dist.plan.transfer import ChunkTransfer, HopPlan

# Of a pass over a chunk: before its layers, where it is at a layer (between the layer's leaving its entry and its read of
# others'; going back the other way round), behind its layers.
Point = int | Literal["before", "behind"]


class Cargo(Enum):
    RESIDUAL = "residual"
    ENTRIES = "entries"
    SUMS = "sums"


@dataclass(frozen=True, kw_only=True)
class Message:
    """What travels together from one chunk to another, of every microbatch; from a later chunk to an earlier one, its gradient.

    layers: those whose entries it holds, or for whose readers its sums are, ascending; none of the residual.
    leaves: the point of the sender's pass behind which it is sent; "before" for what is sent on as it came.
    needed: the point of the receiver's pass that waits for it.
    """

    cargo: Cargo
    from_chunk: int
    to_chunk: int
    layers: tuple[int, ...] = ()
    num_bytes: int
    leaves: Point
    needed: Point

    def __hash__(self) -> int:
        """Without the layers, which are many: those that have all of these in common are few."""
        return hash((self.from_chunk, self.to_chunk, self.leaves, self.needed, self.num_bytes))

    @property
    def is_gradient(self) -> bool:
        return self.to_chunk < self.from_chunk

    @property
    def passes_by(self) -> bool:
        """It is made of what another message brought, and leaves before the sender's layers run."""
        return self.leaves == "before"

    def __str__(self) -> str:
        what = f"gradient of {self.cargo.value}" if self.is_gradient else self.cargo.value
        layers = f" of layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{what}{layers} from chunk {self.from_chunk} to {self.to_chunk}"


@dataclass(frozen=True)
class HopEnd:
    """A chunk at one end of a hop."""

    layers: range
    transfer: ChunkTransfer

    def leaves_sum(self, reader: int) -> Point:
        """Forward, of a sum for a layer of a later chunk."""
        return "behind" if reader in self.transfer.reads else "before"

    def needs_sum(self, reader: int) -> Point:
        """Forward, of a sum that arrives here."""
        if reader in self.transfer.added_before or reader not in {*self.layers, *self.transfer.reads}:
            return "before"
        # What the chunk's own entries are added to must be here behind the last of them.
        return reader if reader in self.layers else self.transfer.own_entries(self.layers)[-1]

    def leaves_gradient_of_sum(self, reader: int) -> Point:
        """A sum goes into the next one with weight 1, so that one gradient serves all chunks on its way."""
        return reader if reader in self.layers else "before"

    def leaves_entry(self, layer: int) -> Point:
        return layer if layer in self.layers else "before"

    def leaves_gradient_of_entry(self, layer: int) -> Point:
        """Backward, of an entry made before: that of one which is read here has a share of this chunk added behind the walk."""
        return "behind" if layer in self.transfer.added else "before"

    def needs_gradient_of_entry(self, layer: int) -> Point:
        """Backward, of an entry that was sent."""
        return layer if layer in self.layers else self.leaves_gradient_of_entry(layer)


def forward_messages(hop: HopPlan, sender: HopEnd, receiver: HopEnd, shape: BundleShape) -> tuple[Message, ...]:
    """Over a hop, in the order in which they leave."""
    tensors = [_Tensor(Cargo.RESIDUAL, None, "behind", "before")]
    tensors += [_Tensor(Cargo.ENTRIES, layer, sender.leaves_entry(layer), "before") for layer in hop.raw_entries]
    tensors += [
        _Tensor(Cargo.SUMS, reader, sender.leaves_sum(reader), receiver.needs_sum(reader))
        for reader in hop.partial_sums
    ]
    orders = points(sender.layers, Kind.FORWARD), points(receiver.layers, Kind.FORWARD)
    return _Packer((hop.hop, hop.hop + 1), *orders, shape).pack(tensors)


def backward_messages(hop: HopPlan, sender: HopEnd, receiver: HopEnd, shape: BundleShape) -> tuple[Message, ...]:
    """The gradients of the same, from the chunk behind the hop to the one before it, in the order in which they leave."""
    tensors = [_Tensor(Cargo.RESIDUAL, None, "behind", "before")]
    tensors += [
        _Tensor(Cargo.ENTRIES, layer, sender.leaves_gradient_of_entry(layer), receiver.needs_gradient_of_entry(layer))
        for layer in hop.raw_entries
    ]
    tensors += [
        _Tensor(Cargo.SUMS, reader, sender.leaves_gradient_of_sum(reader), "before") for reader in hop.partial_sums
    ]
    orders = points(sender.layers, Kind.BACKWARD), points(receiver.layers, Kind.BACKWARD)
    return _Packer((hop.hop + 1, hop.hop), *orders, shape).pack(tensors)


def points(layers: range, kind: Kind) -> tuple[Point, ...]:
    """Of a pass over `layers`, in order."""
    return "before", *(layers if kind is Kind.FORWARD else reversed(layers)), "behind"


class _Tensor(NamedTuple):
    cargo: Cargo
    layer: int | None
    leaves: Point
    needed: Point


@dataclass(frozen=True)
class _Packer:
    """leaving, needing: the points of the sender's and of the receiver's pass, in order."""

    way: tuple[int, int]
    leaving: Sequence[Point]
    needing: Sequence[Point]
    shape: BundleShape

    def pack(self, tensors: Sequence[_Tensor]) -> tuple[Message, ...]:
        """Of what leaves together the residual is ahead, as a whole pass waits for it, then what is needed first."""
        alone = [self._message(tensor) for tensor in sorted(tensors, key=self._order)]
        return tuple(self._packed(self._packed(alone, _at_the_same_points), self._is_too_small))

    def _packed(self, messages: Sequence[Message], go_together: Callable[[Message, Message], bool]) -> list[Message]:
        packed: list[Message] = []
        for message in messages:
            joins = bool(packed) and packed[-1].cargo is message.cargo and go_together(packed[-1], message)
            packed.append(self._join(packed.pop(), message) if joins else message)
        return packed

    def _order(self, tensor: _Tensor) -> tuple[int, bool, int]:
        is_residual = tensor.cargo is Cargo.RESIDUAL
        return self.leaving.index(tensor.leaves), not is_residual, self.needing.index(tensor.needed)

    def _message(self, tensor: _Tensor) -> Message:
        size_of = {
            Cargo.RESIDUAL: self.shape.residual_bytes,
            Cargo.ENTRIES: self.shape.entry_bytes,
            Cargo.SUMS: self.shape.sum_bytes,
        }
        return Message(
            cargo=tensor.cargo,
            from_chunk=self.way[0],
            to_chunk=self.way[1],
            layers=() if tensor.layer is None else (tensor.layer,),
            num_bytes=size_of[tensor.cargo],
            leaves=tensor.leaves,
            needed=tensor.needed,
        )

    def _is_too_small(self, one: Message, following: Message) -> bool:
        """To be sent alone. What passes by waits for nothing else."""
        return one.num_bytes < self.shape.min_message_bytes and one.passes_by == following.passes_by

    def _join(self, one: Message, following: Message) -> Message:
        return replace(
            following,
            layers=tuple(sorted((*one.layers, *following.layers))),
            num_bytes=one.num_bytes + following.num_bytes,
            needed=min(one.needed, following.needed, key=self.needing.index),
        )


def _at_the_same_points(one: Message, following: Message) -> bool:
    return (one.leaves, one.needed) == (following.leaves, following.needed)
