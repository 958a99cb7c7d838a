"""The decoder layer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

LLaMA's layer, save that the keys and values of a layer with a router come from the depth memory, as `key_value`
and `hidden` say. Written against `Parts`; knows no process group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.config import ModelConfig
from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.parts import Parts


class KeyValueCache:
    """Routed, rotated keys and values of the tokens so far, one pair a layer: the size of LLaMA's cache."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return next(iter(self.kv.values()))[0].shape[2] if self.kv else 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, new tokens, head_dim]; returns all so far."""
        if layer in self.kv:
            keys = torch.cat((self.kv[layer][0], keys), dim=2)
            values = torch.cat((self.kv[layer][1], values), dim=2)
        self.kv[layer] = (keys, values)
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but those at `rows`: booleans [batch]."""
        self.kv = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.kv.items()}


@dataclass(frozen=True)
class Pass:
    """One microbatch on its way through the layers of a stage."""

    batch_size: int
    seq_length: int  # new tokens of each sequence
    cos: Tensor  # [seq_length, head_dim]
    sin: Tensor
    memory: DepthMemory
    cache: KeyValueCache | None = None
    visible: Tensor | None = None  # [batch, 1, seq, seq], which inputs each sees; None: all before it

    @property
    def num_tokens(self) -> int:
        return self.batch_size * self.seq_length

    def to_sequences(self, heads: Tensor) -> Tensor:
        """[heads, rows, head_dim], rows padded past the tokens -> [batch, heads, seq, head_dim]."""
        heads = heads[:, : self.num_tokens]
        return heads.unflatten(1, (self.batch_size, self.seq_length)).transpose(0, 1)


def rope_tables(start: int, length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of positions start.., in rotate-half form (RoFormer; LLaMA's convention), fp32."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(start, start + length, dtype=torch.float32, device=device), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class RotaryTables:
    """`rope_tables` in the layers' dtype, made again only for other positions: in training once."""

    def __init__(self, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device):
        self._head_dim, self._theta, self._dtype, self._device = head_dim, theta, dtype, device
        self._positions, self._tables = range(0), (torch.empty(0), torch.empty(0))

    def at(self, positions: range) -> tuple[Tensor, Tensor]:
        """cos and sin [len(positions), head_dim] of consecutive positions."""
        if positions != self._positions:
            with torch.inference_mode(False):  # else autograd could not keep them for a later backward pass
                cos, sin = rope_tables(positions.start, len(positions), self._head_dim, self._theta, self._device)
                self._tables = cos.to(self._dtype), sin.to(self._dtype)
            self._positions = positions
        return self._tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [..., seq, head_dim]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, parts: Parts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=parts.dtype, device=parts.device))
        self.eps, self._parts = eps, parts

    def forward(self, residual: Tensor) -> Tensor:
        return F.rms_norm(residual, self.weight.shape, self._parts.for_residual(self.weight), self.eps)


class Attention(nn.Module, ABC):
    """Grouped-query attention. Where queries, keys and values come from is for a subclass to say."""

    def __init__(self, model: ModelConfig, layer: int, parts: Parts):
        super().__init__()
        self.layer, self.head_dim, self._parts = layer, model.head_dim, parts
        self.query_heads, self.kv_heads = model.num_heads // parts.tp_size, model.kv_heads // parts.tp_size
        self.o_proj = parts.row_linear(model.num_heads * model.head_dim, model.hidden_size)

    @abstractmethod
    def project(self, residual: Tensor, normed: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        """From the residual [rows, hidden], as it is and normed, and the depth memory's chain of operations:

        queries [H / tp, tokens, head_dim], keys and values [H_kv / tp, 2, tokens, head_dim], the chain behind its own.
        """

    def split_heads(self, projected: Tensor) -> Tensor:
        """[tokens, heads * head_dim] -> [heads, tokens, head_dim]."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    def forward(self, residual: Tensor, normed: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        """What the layer adds to the residual [rows, hidden], and the depth memory's chain behind it."""
        queries, kv, chain = self.project(residual, normed, chain, run)
        padding = queries.shape[1] - run.num_tokens  # rows that fill up the tensor group's last share
        cos, sin = run.cos, run.sin
        queries = rotate(run.to_sequences(queries), cos, sin)
        keys, values = rotate(run.to_sequences(kv[:, 0]), cos, sin), run.to_sequences(kv[:, 1])
        if run.cache is not None:
            keys, values = run.cache.extend(self.layer, keys, values)
        mixed = _attend(queries, keys, values, run.visible)
        mixed = mixed.permute(0, 2, 1, 3).reshape(run.num_tokens, -1)
        return self.o_proj(F.pad(mixed, (0, 0, 0, padding)) if padding else mixed), chain


class OwnAttention(Attention):
    """LLaMA's: all from the layer's own normed input."""

    def __init__(self, model: ModelConfig, layer: int, parts: Parts):
        super().__init__(model, layer, parts)
        self.qkv_proj = parts.column_linear(model.hidden_size, (model.num_heads + 2 * model.kv_heads) * model.head_dim)

    def project(self, residual: Tensor, normed: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.split_heads(self.qkv_proj(normed))
        queries, kv = heads[: self.query_heads], heads[self.query_heads :].unflatten(0, (2, self.kv_heads))
        return queries, kv.transpose(0, 1), chain


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of the last `queries` of the sequence over all keys, causal without a mask; [batch, heads, tokens, head_dim]."""
    grouped = queries.shape[1] != keys.shape[1]
    new, seen = queries.shape[2], keys.shape[2]
    if mask is None and new == seen:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)
    if mask is None:
        mask = torch.ones(new, seen, dtype=torch.bool, device=queries.device).tril(seen - new)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=grouped)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        self.gate_up_proj = parts.column_linear(model.hidden_size, 2 * model.intermediate_size)
        self.down_proj = parts.row_linear(model.intermediate_size, model.hidden_size)

    def forward(self, normed: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(normed).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, model: ModelConfig, attention: Attention, parts: Parts):
        super().__init__()
        self.input_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps, parts)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps, parts)
        self.mlp = MLP(model, parts)

    def forward(self, residual: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        mixed, chain = self.self_attn(residual, self.input_layernorm(residual), chain, run)
        residual = residual + mixed
        return residual + self.mlp(self.post_attention_layernorm(residual)), chain
