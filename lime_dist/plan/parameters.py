"""Which parameters a stage holds, and which slice of which logical tensor each of them is. Pure data.

A *logical tensor* is what the unsharded model has, named as in Hugging Face's LLaMA
(`layers.3.self_attn.k_proj.weight`; routers `layers.3.self_attn.lime_router.weight`). A *parameter* is
what one rank holds: fused (Q, K and V in one matrix), cut over the tensor group, the vocabulary padded.
Initial weights, checkpoints and comparisons speak of logical tensors, so they mean the same under every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from lime_dist.config import ModelConfig
from lime_dist.depth.pattern import Pattern
from lime_dist.depth.routing import Routing
from lime_dist.plan.transfer import ChunkTransfer, plan_transfer

VOCABULARY_MULTIPLE = 128  # Megatron's make-vocab-size-divisible-by, per tensor rank


class Role(Enum):
    """What a logical tensor is; decides its initial values and its optimiser group."""

    EMBEDDING = "embedding"
    NORM = "norm"
    KEY_VALUE = "key_value"
    PROJECTION = "projection"
    ROUTER = "router"  # of keys and values
    HIDDEN_ROUTER = "hidden_router"
    DYNAMIC_ROUTER = "dynamic_router"


ROUTER_ROLES = (Role.ROUTER, Role.HIDDEN_ROUTER, Role.DYNAMIC_ROUTER)


@dataclass(frozen=True)
class LogicalTensor:
    name: str
    shape: tuple[int, ...]
    role: Role


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


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of 128 * tp, as Megatron pads it."""
    multiple = VOCABULARY_MULTIPLE * tp
    return (vocab_size + multiple - 1) // multiple * multiple


def logical_tensors(model: ModelConfig, pattern: Pattern) -> dict[str, LogicalTensor]:
    """Every tensor of the unsharded model, by name."""
    layers = range(model.num_layers)
    transfer = plan_transfer(pattern, (layers,), policy="relay").chunk(0)
    specs = plan_parameters(model, transfer, layers, tp=1, tp_rank=0, vocab_rows=model.vocab_size)
    return {piece.tensor.name: piece.tensor for spec in specs for piece in spec.pieces}


def plan_parameters(
    model: ModelConfig, transfer: ChunkTransfer, layers: range, *, tp: int, tp_rank: int, vocab_rows: int
) -> tuple[ParameterSpec, ...]:
    """The parameters that tensor rank `tp_rank` of the stage with `layers` holds.

    vocab_rows: rows of the embedding over the whole tensor group, padding included.
    """
    return tuple(_parameters(_Cutter(tp, tp_rank, vocab_rows), model, transfer, layers))


@dataclass(frozen=True)
class _Cutter:
    tp: int
    tp_rank: int
    vocab_rows: int

    def whole(self, name: str, shape: tuple[int, ...], role: Role) -> ParameterSpec:
        piece = Piece(LogicalTensor(name, shape, role), 0, 0, shape[0], 0)
        return ParameterSpec(name, shape, (piece,), sharded=False)

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

    def vocabulary(self, name: str, tensor: LogicalTensor, tied_copy: bool = False) -> ParameterSpec:
        vocab_size, hidden = tensor.shape
        rows = self.vocab_rows // self.tp
        start = min(self.tp_rank * rows, vocab_size)
        length = min(rows, vocab_size - start)
        return ParameterSpec(
            name, (rows, hidden), (Piece(tensor, 0, start, length, 0),), sharded=True, tied_copy=tied_copy
        )


def _parameters(cut: _Cutter, model: ModelConfig, transfer: ChunkTransfer, layers: range) -> Iterator[ParameterSpec]:
    is_first, is_last = layers.start == 0, layers.stop == model.num_layers
    embedding = LogicalTensor("embed_tokens.weight", (model.vocab_size, model.hidden_size), Role.EMBEDDING)
    if is_first:
        yield cut.vocabulary(embedding.name, embedding)
    for layer in layers:
        yield from _layer_parameters(cut, model, transfer, layer)
    for reader in transfer.reads:
        if reader not in layers:
            yield _key_value_router(f"partial_routers.{reader}.weight", model, transfer, reader)
    if not is_last:
        return
    yield cut.whole("norm.weight", (model.hidden_size,), Role.NORM)
    if not model.tie_embeddings:
        head = LogicalTensor("lm_head.weight", embedding.shape, Role.PROJECTION)
        yield cut.vocabulary(head.name, head)
    elif not is_first:
        yield cut.vocabulary("lm_head.weight", embedding, tied_copy=True)


def _layer_parameters(cut: _Cutter, model: ModelConfig, transfer: ChunkTransfer, layer: int) -> Iterator[ParameterSpec]:
    prefix, hidden, inner = f"layers.{layer}.", model.hidden_size, model.intermediate_size
    matrix = _matrices_of(prefix)
    yield cut.whole(f"{prefix}input_layernorm.weight", (hidden,), Role.NORM)
    yield from _attention_inputs(cut, model, transfer, layer)
    yield cut.rows(matrix("self_attn.o_proj", hidden, model.num_heads * model.head_dim))
    yield cut.whole(f"{prefix}post_attention_layernorm.weight", (hidden,), Role.NORM)
    yield cut.columns(
        f"{prefix}mlp.gate_up_proj.weight",
        [matrix("mlp.gate_proj", inner, hidden), matrix("mlp.up_proj", inner, hidden)],
    )
    yield cut.rows(matrix("mlp.down_proj", hidden, inner))


def _matrices_of(prefix: str) -> Callable[..., LogicalTensor]:
    def matrix(name: str, outputs: int, inputs: int, role: Role = Role.PROJECTION) -> LogicalTensor:
        return LogicalTensor(f"{prefix}{name}.weight", (outputs, inputs), role)

    return matrix


def _attention_inputs(cut: _Cutter, model: ModelConfig, transfer: ChunkTransfer, layer: int) -> Iterator[ParameterSpec]:
    """Q, K and V, and what mixes the entries that they are made of. A reader of hidden states makes Q of something else than K and V."""
    prefix, hidden, kv_size = f"layers.{layer}.self_attn.", model.hidden_size, model.kv_heads * model.head_dim
    matrix = _matrices_of(prefix)
    queries = matrix("q_proj", model.num_heads * model.head_dim, hidden)
    keys_values = [matrix(name, kv_size, hidden, Role.KEY_VALUE) for name in ("k_proj", "v_proj")]
    is_reader, reads_hidden = layer in transfer.reads, transfer.pattern.routing is not Routing.KEY_VALUE
    if not (is_reader and reads_hidden):
        yield cut.columns(f"{prefix}qkv_proj.weight", [queries, *keys_values])
        if is_reader:
            yield _key_value_router(f"{prefix}lime_router.weight", model, transfer, layer)
        return
    yield cut.columns(queries.name, [queries])
    yield cut.columns(f"{prefix}kv_proj.weight", keys_values)
    yield cut.whole(f"{prefix}depth_norm.weight", (hidden,), Role.NORM)
    yield _hidden_router(cut, f"{prefix}lime_router.weight", model, transfer, layer)


def _hidden_router(cut: _Cutter, name: str, model: ModelConfig, transfer: ChunkTransfer, reader: int) -> ParameterSpec:
    num_heads, num_sources = model.kv_heads, len(transfer.reads[reader])
    if transfer.pattern.routing is Routing.HIDDEN_DYNAMIC:
        return cut.whole(name, (num_heads * num_sources, model.hidden_size), Role.DYNAMIC_ROUTER)
    return cut.whole(name, (num_heads, num_sources), Role.HIDDEN_ROUTER)


def _key_value_router(name: str, model: ModelConfig, transfer: ChunkTransfer, reader: int) -> ParameterSpec:
    """The slice of a reader's router over the sources that this stage adds: one owner for each slice."""
    all_sources, here = transfer.pattern.sources[reader], transfer.reads[reader]
    shape = (model.kv_heads, len(all_sources), model.kv_heads)
    tensor = LogicalTensor(f"layers.{reader}.self_attn.lime_router.weight", shape, Role.ROUTER)
    pieces: list[Piece] = []
    for local, source in enumerate(here):
        start = all_sources.index(source)
        last = pieces[-1] if pieces else None
        if last is not None and last.start + last.length == start:
            pieces[-1] = replace(last, length=last.length + 1)
        else:
            pieces.append(Piece(tensor, 1, start, 1, local))
    return ParameterSpec(name, (model.kv_heads, len(here), model.kv_heads), tuple(pieces), sharded=False)


def count_parameters(specs: tuple[ParameterSpec, ...]) -> int:
    """Elements of the logical tensors' slices, padding and tied copies left out."""
    return sum(
        prod(piece.tensor.shape) // piece.tensor.shape[piece.dim] * piece.length
        for spec in specs
        if not spec.tied_copy
        for piece in spec.pieces
    )
