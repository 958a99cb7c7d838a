"""What the layers of a whole model hold while it reads text: hidden states, values, weights of dynamic routers.

Seen by forward hooks, and by the cache that decoding has: the model's own code does not know of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy
import torch
from torch import Tensor, nn

from lime_dist.lime.layers import Attention, DecoderLayer, KeyValueCache, OwnAttention
from lime_dist.lime.model import LimeChunk

HIDDEN_STATES, VALUES, RAW_VALUES = KINDS = ("hidden_states", "values", "raw_values")

Activations = dict[str, dict[int, Tensor]]  # kind -> layer -> [batch, seq, features]


@torch.no_grad()
def collect(model: LimeChunk, tokens: Tensor) -> Activations:
    """Of token ids [batch, seq] on the model's device.

    hidden_states: the residual stream behind the layer. values: as attention uses them, all KV heads side by side; with
    a v2 router sum_i R_i V_i (arXiv 2502.09245v2, eq. 3). raw_values: V = W_V x of the layer's own normed input, before
    any routing; a reader of v1 has none, as it projects the mix.
    """
    found: Activations = {kind: {} for kind in KINDS}
    cache = KeyValueCache()
    with ExitStack() as hooks:
        for layer, module in _layers(model):
            hooks.enter_context(_keeping(module, found[HIDDEN_STATES], layer, tokens, lambda out: out[0]))
            if isinstance(module.self_attn, OwnAttention):
                hooks.enter_context(_raw_values(module.self_attn, found[RAW_VALUES], layer, tokens))
        model(tokens, *tokens.shape, model.new_memory(tokens.numel()), cache=cache)
    found[VALUES] = {layer: values.transpose(1, 2).flatten(2) for layer, (_, values) in cache.kv.items()}
    return found


def _layers(model: LimeChunk) -> Iterator[tuple[int, DecoderLayer]]:
    for layer, module in model.layers.items():
        yield int(layer), cast(DecoderLayer, module)


def attentions(model: LimeChunk) -> Iterator[tuple[int, Attention]]:
    """By layer."""
    for layer, module in _layers(model):
        yield layer, module.self_attn


def _raw_values(attention: OwnAttention, into: dict[int, Tensor], layer: int, tokens: Tensor) -> Any:
    """Q, K and V come of one matrix, V last."""
    width = attention.kv_heads * attention.head_dim
    return _keeping(attention.qkv_proj, into, layer, tokens, lambda out: out[:, -width:])


@contextmanager
def _keeping(module: nn.Module, into: dict[int, Tensor], layer: int, tokens: Tensor, part: Any) -> Iterator[None]:
    """`part` of what the module gives, [rows, features], as [batch, seq, features]."""

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        into[layer] = part(output)[: tokens.numel()].unflatten(0, tuple(tokens.shape))

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def mean_token_weights(model: LimeChunk, batches: Iterable[Tensor]) -> dict[int, numpy.ndarray]:
    """Of each reader with a dynamic router [heads, sources]: its softmax weights, mean over all tokens [batch, seq]."""
    sums: dict[int, Tensor] = {}
    num_tokens = 0
    with ExitStack() as hooks:
        for layer, attention in attentions(model):
            router = getattr(attention, "lime_router", None)
            if router is not None:
                hooks.enter_context(_summing(router, sums, layer))
        for tokens in batches:
            num_tokens += tokens.numel()
            model(tokens, *tokens.shape, model.new_memory(tokens.numel()))
    return {layer: (total / num_tokens).cpu().numpy() for layer, total in sums.items()}


@contextmanager
def _summing(router: nn.Module, sums: dict[int, Tensor], layer: int) -> Iterator[None]:
    def add(_: nn.Module, __: Any, weights: Tensor) -> None:
        """weights: [tokens, heads, sources]."""
        total = weights.double().sum(0)
        sums[layer] = sums[layer] + total if layer in sums else total

    handle = router.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
