"""Which parameters a stage holds, and which slice of which logical tensor each of them is (`tensors.py`). Pure data.

Initial weights, checkpoints and comparisons speak of logical tensors, so they mean the same under every layout.
Those of a reader's attention are for its kind of depth routing to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from lime_dist.config import ModelConfig
from lime_dist.depth.pattern import Pattern
from lime_dist.depth.routing import Read, router_name
from lime_dist.plan.tensors import Cutter, LogicalTensor, ParameterSpec, Piece, Role
from lime_dist.plan.transfer import ChunkTransfer, plan_transfer

VOCABULARY_MULTIPLE = 128  # Megatron's make-vocab-size-divisible-by, per tensor rank


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary rounded up to a multiple of 128 * tp, as Megatron pads it."""
    multiple = VOCABULARY_MULTIPLE * tp
    return (vocab_size + multiple - 1) // multiple * multiple


def logical_tensors(model: ModelConfig, pattern: Pattern) -> dict[str, LogicalTensor]:
    """Every tensor of the unsharded model, by name."""
    return {name: piece.tensor for name, piece in whole_pieces(model, pattern).items()}


def whole_pieces(model: ModelConfig, pattern: Pattern) -> dict[str, Piece]:
    """The same with the dimension along which tensor ranks would cut each."""
    layers = range(model.num_layers)
    transfer = plan_transfer(pattern, (layers,), policy="relay").chunk(0)
    specs = plan_parameters(model, transfer, layers, tp=1, tp_rank=0, vocab_rows=model.vocab_size)
    return {piece.tensor.name: piece for spec in specs for piece in spec.pieces}


def total_parameters(model: ModelConfig, pattern: Pattern) -> int:
    """Of the unsharded model; an embedding that is the head too counts once."""
    return sum(prod(tensor.shape) for tensor in logical_tensors(model, pattern).values())


def router_parameters(model: ModelConfig, pattern: Pattern) -> int:
    """Those of `total_parameters` that routers hold."""
    tensors = logical_tensors(model, pattern).values()
    return sum(prod(tensor.shape) for tensor in tensors if tensor.role is Role.ROUTER)


def plan_parameters(
    model: ModelConfig, transfer: ChunkTransfer, layers: range, *, tp: int, tp_rank: int, vocab_rows: int
) -> tuple[ParameterSpec, ...]:
    """The parameters that tensor rank `tp_rank` of the stage with `layers` holds.

    vocab_rows: rows of the embedding over the whole tensor group, padding included.
    """
    return tuple(_parameters(Cutter(tp, tp_rank), model, transfer, layers, vocab_rows))


def _parameters(
    cut: Cutter, model: ModelConfig, transfer: ChunkTransfer, layers: range, vocab_rows: int
) -> Iterator[ParameterSpec]:
    is_first, is_last = layers.start == 0, layers.stop == model.num_layers
    embedding = LogicalTensor("embed_tokens.weight", (model.vocab_size, model.hidden_size), Role.EMBEDDING)
    if is_first:
        yield cut.vocabulary(embedding.name, embedding, vocab_rows)
    for layer in layers:
        yield from _layer_parameters(cut, model, transfer, layer)
    for reader in transfer.reads:
        if reader not in layers:
            yield from _router(cut, f"partial_routers.{reader}.weight", model, transfer, reader)
    if not is_last:
        return
    yield cut.whole(LogicalTensor("norm.weight", (model.hidden_size,), Role.NORM))
    if not model.tie_embeddings:
        head = LogicalTensor("lm_head.weight", embedding.shape, Role.PROJECTION)
        yield cut.vocabulary(head.name, head, vocab_rows)
    elif not is_first:
        yield cut.vocabulary("lm_head.weight", embedding, vocab_rows, tied_copy=True)


def _layer_parameters(cut: Cutter, model: ModelConfig, transfer: ChunkTransfer, layer: int) -> Iterator[ParameterSpec]:
    prefix, hidden, inner = f"layers.{layer}.", model.hidden_size, model.intermediate_size

    def matrix(name: str, outputs: int, inputs: int) -> LogicalTensor:
        return LogicalTensor(f"{prefix}{name}.weight", (outputs, inputs), Role.PROJECTION)

    def norm(name: str) -> LogicalTensor:
        return LogicalTensor(f"{prefix}{name}.weight", (hidden,), Role.NORM)

    yield cut.whole(norm("input_layernorm"))
    yield from _attention_inputs(cut, model, transfer, layer)
    yield cut.rows(matrix("self_attn.o_proj", hidden, model.num_heads * model.head_dim))
    yield cut.whole(norm("post_attention_layernorm"))
    yield cut.columns(
        f"{prefix}mlp.gate_up_proj.weight",
        [matrix("mlp.gate_proj", inner, hidden), matrix("mlp.up_proj", inner, hidden)],
    )
    yield cut.rows(matrix("mlp.down_proj", hidden, inner))


def _attention_inputs(cut: Cutter, model: ModelConfig, transfer: ChunkTransfer, layer: int) -> Iterator[ParameterSpec]:
    """Q, K and V, and of a reader what its kind of routing asks for."""
    routing = transfer.pattern.routing
    if layer not in transfer.reads:
        yield routing.own_attention(cut, model, layer)
        return
    yield from routing.reader_parameters(cut, model, layer)
    yield from _router(cut, router_name(layer), model, transfer, layer)


def _router(
    cut: Cutter, name: str, model: ModelConfig, transfer: ChunkTransfer, reader: int
) -> Iterator[ParameterSpec]:
    read = Read(reader, transfer.pattern.sources[reader], transfer.reads[reader])
    router = transfer.pattern.routing.router(cut, name, model, read)
    if router is not None:
        yield router


def count_parameters(specs: Iterable[ParameterSpec]) -> int:
    """Elements that a rank holds of them, the vocabulary's padding and the copy of a tied embedding too."""
    return sum(prod(spec.shape) for spec in specs)
