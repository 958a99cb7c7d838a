"""What crosses a hop as messages: each is addressed, has a size, and leaves at a known moment. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lime_dist.plan.shape import BundleShape
from lime_dist.plan.transfer import HopPlan


class Cargo(Enum):
    RESIDUAL = "residual"
    ENTRIES = "entries"
    SUMS = "sums"


@dataclass(frozen=True, kw_only=True)
class Message:
    """What travels together from one chunk to another, of every microbatch; from a later chunk to an earlier one, its gradient.

    layers: those whose entries it holds, or for whose readers its sums are, ascending; none of the residual.
    passes_by: it was received as it is, so it leaves before the sender's layers run.
    """

    cargo: Cargo
    from_chunk: int
    to_chunk: int
    layers: tuple[int, ...] = ()
    num_bytes: int
    passes_by: bool = False

    @property
    def is_gradient(self) -> bool:
        return self.to_chunk < self.from_chunk

    def __str__(self) -> str:
        what = f"gradient of {self.cargo.value}" if self.is_gradient else self.cargo.value
        layers = f" of layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{what}{layers} from chunk {self.from_chunk} to {self.to_chunk}"


def forward_messages(hop: HopPlan, first_made: int, shape: BundleShape) -> tuple[Message, ...]:
    """Over a hop, in the order in which they leave. first_made: the first layer of the chunk that sends.

    What passes by leaves first. Then the residual, for which the next chunk waits longest; then what its layers read.
    """
    start, stop, entry = hop.hop, hop.hop + 1, shape.entry_bytes
    passing = tuple(layer for layer in hop.raw_entries if layer < first_made)
    made = tuple(layer for layer in hop.raw_entries if layer >= first_made)
    return (
        *_message(Cargo.ENTRIES, start, stop, passing, entry, passes_by=True),
        _residual(start, stop, shape),
        *_message(Cargo.ENTRIES, start, stop, made, entry),
        *_message(Cargo.SUMS, start, stop, hop.partial_sums, shape.sum_bytes),
    )


def backward_messages(hop: HopPlan, shape: BundleShape) -> tuple[Message, ...]:
    """The gradients of the same, in the order in which they leave: the walk back begins with the residual's and the sums'."""
    start, stop = hop.hop + 1, hop.hop
    return (
        _residual(start, stop, shape),
        *_message(Cargo.SUMS, start, stop, hop.partial_sums, shape.sum_bytes),
        *_message(Cargo.ENTRIES, start, stop, hop.raw_entries, shape.entry_bytes),
    )


def _residual(from_chunk: int, to_chunk: int, shape: BundleShape) -> Message:
    return Message(cargo=Cargo.RESIDUAL, from_chunk=from_chunk, to_chunk=to_chunk, num_bytes=shape.residual_bytes)


def _message(
    cargo: Cargo, from_chunk: int, to_chunk: int, layers: tuple[int, ...], each_bytes: int, *, passes_by: bool = False
) -> tuple[Message, ...]:
    """Nothing where there are no layers: an empty message does not travel."""
    if not layers:
        return ()
    num_bytes = len(layers) * each_bytes
    return (
        Message(
            cargo=cargo,
            from_chunk=from_chunk,
            to_chunk=to_chunk,
            layers=layers,
            num_bytes=num_bytes,
            passes_by=passes_by,
        ),
    )
