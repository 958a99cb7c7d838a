"""Logical tensors, parameters, and how tensor ranks cut one into the other. Pure data.

A *logical tensor* is what the unsharded model has, named as in Hugging Face's LLaMA
(`layers.3.self_attn.k_proj.weight`; routers `layers.3.self_attn.lime_router.weight`). A *parameter* is
what one rank holds: fused (Q, K and V in one matrix), cut over the tensor group, the vocabulary padded.
Which tensors there are say `parameters.py` and the kinds of depth routing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by torch's names
KINDS = ("weight", *MOMENTS)  # of values that a parameter has in a training state


class Role(Enum):
    """What a logical tensor is; decides its optimiser group and, where it has no `initial`, its initial values."""

    EMBEDDING = "embedding"
    NORM = "norm"
    PROJECTION = "projection"
    ROUTER = "router"


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Initial values from normal(0, std)."""

    std: float


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Initial values from uniform(-bound, bound).

    own_identity: of a router [heads, sources, heads] the slice of the last source, the reader's own, is the identity; of one
    [heads, sources], each head for itself, it is 1.
    """

    bound: float
    own_identity: bool = False


Initial = Normal | Uniform


@dataclass(frozen=True)
class LogicalTensor:
    """initial: None for what all tensors of the role begin with."""

    name: str
    shape: tuple[int, ...]
    role: Role
    initial: Initial | None = None


@dataclass(frozen=True)
class Piece:
    """`tensor[start : start + length]` along `dim` lies in the parameter at `local_start` along the same `dim`."""

    tensor: LogicalTensor
    dim: int
    start: int
    length: int
    local_start: int


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter of one rank.

    sharded: cut over the tensor group, so that no two tensor ranks hold the same values.
    tied_copy: the last stage's copy of the first stage's embedding.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    sharded: bool
    tied_copy: bool = False

    @property
    def role(self) -> Role:
        return self.pieces[0].tensor.role


@dataclass(frozen=True)
class Cutter:
    """Makes the parameters of tensor rank `tp_rank` of `tp`."""

    tp: int
    tp_rank: int

    def whole(self, tensor: LogicalTensor) -> ParameterSpec:
        """Every tensor rank holds all of it."""
        return ParameterSpec(tensor.name, tensor.shape, (Piece(tensor, 0, 0, tensor.shape[0], 0),), sharded=False)

    def columns(self, name: str, sections: list[LogicalTensor]) -> ParameterSpec:
        """Several output-major matrices, each cut along its outputs, stacked in one parameter."""
        pieces, rows = [], 0
        for tensor in sections:
            length = tensor.shape[0] // self.tp
            pieces.append(Piece(tensor, 0, self.tp_rank * length, length, rows))
            rows += length
        return ParameterSpec(name, (rows, sections[0].shape[1]), tuple(pieces), sharded=True)

    def rows(self, tensor: LogicalTensor) -> ParameterSpec:
        """One matrix, cut along its inputs."""
        outputs, inputs = tensor.shape
        length = inputs // self.tp
        piece = Piece(tensor, 1, self.tp_rank * length, length, 0)
        return ParameterSpec(tensor.name, (outputs, length), (piece,), sharded=True)

    def vocabulary(self, name: str, tensor: LogicalTensor, padded_rows: int, tied_copy: bool = False) -> ParameterSpec:
        """padded_rows: over the whole tensor group."""
        vocab_size, hidden = tensor.shape
        rows = padded_rows // self.tp
        start = min(self.tp_rank * rows, vocab_size)
        length = min(rows, vocab_size - start)
        return ParameterSpec(
            name, (rows, hidden), (Piece(tensor, 0, start, length, 0),), sharded=True, tied_copy=tied_copy
        )

    def places(self, name: str, tensor: LogicalTensor, places: list[int]) -> ParameterSpec:
        """Every tensor rank holds those of the tensor's places along its second dimension, in their order."""
        pieces: list[Piece] = []
        for local, start in enumerate(places):
            last = pieces[-1] if pieces else None
            if last is not None and last.start + last.length == start:
                pieces[-1] = replace(last, length=last.length + 1)
            else:
                pieces.append(Piece(tensor, 1, start, 1, local))
        shape = tensor.shape[0], len(places), *tensor.shape[2:]
        return ParameterSpec(name, shape, tuple(pieces), sharded=False)
