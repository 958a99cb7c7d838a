"""What crosses a hop as messages: each is addressed, has a size, leaves at a known point of one pass and is needed at a known
point of another. Pure data.

Moments follow from what the passes do. Forward, a layer leaves its entry as soon as it has projected its input, so that the
entry is on its way while the layer and those behind it run; sums over the chunk's own entries are whole behind its layers, and
each is needed when its reader has projected. Backward, the gradient of a sum is there when its reader has gone back, and that
of an entry is needed when the walk is back at the layer that made it. What leaves at one point for one point is one message.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    return tuple(_packed(tensors, (hop.hop, hop.hop + 1), orders, shape))


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
    return tuple(_packed(tensors, (hop.hop + 1, hop.hop), orders, shape))


def points(layers: range, kind: Kind) -> tuple[Point, ...]:
    """Of a pass over `layers`, in order."""
    return "before", *(layers if kind is Kind.FORWARD else reversed(layers)), "behind"


class _Tensor(NamedTuple):
    cargo: Cargo
    layer: int | None
    leaves: Point
    needed: Point


def _packed(
    tensors: Sequence[_Tensor],
    way: tuple[int, int],
    orders: tuple[Sequence[Point], Sequence[Point]],
    shape: BundleShape,
) -> Iterator[Message]:
    """orders: the points of the sender's and of the receiver's pass. Of what leaves together the residual is ahead, as
    a whole pass waits for it, then what is needed first.
    """
    together: dict[tuple[Cargo, Point, Point], list[int]] = {}
    for cargo, layer, leaves, needed in tensors:
        together.setdefault((cargo, leaves, needed), []).extend([] if layer is None else [layer])
    size_of = {Cargo.ENTRIES: shape.entry_bytes, Cargo.SUMS: shape.sum_bytes}
    for cargo, leaves, needed in sorted(
        together, key=lambda one: (orders[0].index(one[1]), one[0] is not Cargo.RESIDUAL, orders[1].index(one[2]))
    ):
        layers = tuple(sorted(together[cargo, leaves, needed]))
        yield Message(
            cargo=cargo,
            from_chunk=way[0],
            to_chunk=way[1],
            layers=layers,
            num_bytes=shape.residual_bytes if cargo is Cargo.RESIDUAL else len(layers) * size_of[cargo],
            leaves=leaves,
            needed=needed,
        )
