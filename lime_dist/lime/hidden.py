"""LIMe v1: a layer's keys and values are projected from a mix of earlier layers' inputs (arXiv 2502.09245v1).

For KV head h of reader j, over its sources i, with the reader's own RMSNorm of gain g_j, and with weights
w that are a softmax over the sources:

    K_h, V_h = (W_K,h, W_V,h) sum_i w[h, i] RMSNorm_j(x_i),   RMSNorm_j(x) = g_j * x / rms(x)

x_i is the residual stream that enters layer i, so x_0 is the embedding. An entry is x_i / rms(x_i): the gain is
linear, so each reader folds its own into its projections, and one copy of an entry serves all readers.

Entries are in the *tokens* layout, where a rank makes keys and values of its own tokens for all heads.
Each step that uses a parameter is the forward of the module that holds it, as ZeRO 3 asks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lime_dist.config import ModelConfig
from lime_dist.depth.hidden import DynamicRouting, StaticRouting
from lime_dist.lime.depth import Depth
from lime_dist.lime.depth_memory import Run
from lime_dist.lime.layers import Attention, OwnAttention, Pass
from lime_dist.lime.parts import Parts, empty_parameter

# ---- what a reader holds


class StaticRouter(nn.Module):
    """Softmax of learned weights [H_kv, sources], the same for all tokens."""

    def __init__(self, model: ModelConfig, num_sources: int, top_p: float | None, parts: Parts):
        super().__init__()
        self.weight, self._top_p, self._parts = empty_parameter(parts, model.kv_heads, num_sources), top_p, parts

    def forward(self, gained: Tensor) -> Tensor:
        """[H_kv, sources]."""
        return _shares(self._parts.for_tokens(self.weight), self._top_p)


class DynamicRouter(nn.Module):
    """Softmax of a linear map of the reader's own entry with its gain, for each token; weight [H_kv * sources, hidden]."""

    def __init__(self, model: ModelConfig, num_sources: int, top_p: float | None, parts: Parts):
        super().__init__()
        self.weight = empty_parameter(parts, model.kv_heads * num_sources, model.hidden_size)
        self._num_sources, self._top_p, self._parts = num_sources, top_p, parts

    def forward(self, gained: Tensor) -> Tensor:
        """[tokens / tp, hidden] -> [tokens / tp, H_kv, sources]."""
        scores = F.linear(gained, self._parts.for_tokens(self.weight))
        return _shares(scores.unflatten(1, (-1, self._num_sources)), self._top_p)


class AverageRouter(nn.Module):
    """The same for all sources."""

    def __init__(self, model: ModelConfig, num_sources: int, parts: Parts):
        super().__init__()
        self._shape, self._share = (model.kv_heads, num_sources), 1 / num_sources

    def forward(self, gained: Tensor) -> Tensor:
        """[H_kv, sources]."""
        return gained.new_full(self._shape, self._share)


def _shares(scores: Tensor, top_p: float | None) -> Tensor:
    """Softmax over the sources, the last dimension; top_p: see `depth.hidden.StaticRouting`."""
    shares = scores.softmax(-1, dtype=torch.float32)
    return (shares if top_p is None else _pruned(shares, top_p)).to(scores.dtype)


def _pruned(shares: Tensor, top_p: float) -> Tensor:
    """`depth.hidden.pruned`, with a gradient to what stays."""
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(shares).scatter(-1, order, ordered.masked_fill(before >= top_p, 0))
    return kept / kept.sum(-1, keepdim=True)


class KeyValueProjection(nn.Module):
    """W_K and W_V: this rank holds the rows of its heads, K above V, and uses those of all heads on its own tokens."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        self._head_dim, self._parts = model.head_dim, parts
        rows = 2 * model.kv_heads // parts.tp_size * model.head_dim
        self.weight = empty_parameter(parts, rows, model.hidden_size)

    def forward(self) -> Tensor:
        """[H_kv, 2 (K, V) * head_dim, hidden], always a copy. Collective: tp group."""
        by_head = self.weight.unflatten(0, (2, -1, self._head_dim)).transpose(0, 1)
        return self._parts.gather_heads(by_head.clone(memory_format=torch.contiguous_format)).flatten(1, 2)


class DepthNorm(nn.Module):
    """The gain g_j of the reader's own norm: of entries as they are, and folded into its projections."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        self.weight, self._parts = empty_parameter(parts, model.hidden_size), parts

    def forward(self, *entries: Tensor) -> tuple[Tensor, ...]:
        """[..., hidden] each -> the same."""
        gain = self._parts.for_tokens(self.weight)
        return tuple(entry * gain for entry in entries)


# ---- attention


class _EntryWriter:
    """Leaves x_l / rms(x_l) of this rank's tokens [tokens / tp, hidden] in the depth memory."""

    def __init__(self, model: ModelConfig, layer: int, parts: Parts):
        self._eps, self._layer, self._parts = model.rms_norm_eps, layer, parts

    def write(self, residual: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        """The entry, and the chain behind it."""
        tokens = self._parts.residual_to_tokens(residual)
        entry = F.rms_norm(tokens, tokens.shape[-1:], None, self._eps)
        return entry, run.memory.write(self._layer, entry, chain)


class SourceAttention(OwnAttention):
    """An ordinary layer whose input later layers read."""

    def __init__(self, model: ModelConfig, layer: int, parts: Parts):
        super().__init__(model, layer, parts)
        self._entry = _EntryWriter(model, layer, parts)

    def project(self, residual: Tensor, normed: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        _, chain = self._entry.write(residual, chain, run)
        return super().project(residual, normed, chain, run)


class HiddenAttention(Attention):
    """Queries from the layer's normed input, keys and values from the mix of its sources."""

    def __init__(self, model: ModelConfig, layer: int, sources: tuple[int, ...], router: nn.Module, parts: Parts):
        super().__init__(model, layer, parts)
        self._entry, self._sources = _EntryWriter(model, layer, parts), sources
        self.q_proj = parts.column_linear(model.hidden_size, model.num_heads * model.head_dim)
        self.kv_proj = KeyValueProjection(model, parts)
        self.depth_norm = DepthNorm(model, parts)
        self.lime_router = router

    def project(self, residual: Tensor, normed: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        entry, chain = self._entry.write(residual, chain, run)
        gained, projection = self.depth_norm(entry, self.kv_proj())
        kv = MixAndProject.apply(
            self.lime_router(gained), projection, chain, run.memory.runs_read(self.layer, self._sources)
        )
        kv = self._parts.tokens_to_heads(kv.unflatten(-1, (2, self.head_dim)).transpose(1, 2))
        return self.split_heads(self.q_proj(normed)), kv, chain


class HiddenDepth(Depth):
    """Entries cross stages as they are, so there are no sums to begin or to go on with."""

    def routed(self, layer: int) -> Attention:
        if layer not in self.transfer.reads:
            return SourceAttention(self.model, layer, self.parts)
        sources = self.transfer.reads[layer]
        return HiddenAttention(self.model, layer, sources, self._router(len(sources)), self.parts)

    def _router(self, num_sources: int) -> nn.Module:
        routing = self.transfer.pattern.routing
        if isinstance(routing, StaticRouting):
            return StaticRouter(self.model, num_sources, routing.head_top_p, self.parts)
        if isinstance(routing, DynamicRouting):
            return DynamicRouter(self.model, num_sources, routing.head_top_p, self.parts)
        return AverageRouter(self.model, num_sources, self.parts)


# ---- the read


class MixAndProject(torch.autograd.Function):
    """Keys and values [H_kv, tokens, 2 * head_dim] from entries in a buffer: kv[h] = (sum_i w[h, i] x_i) @ projection[h]^T.

    weights: [H_kv, sources], or [tokens, H_kv, sources] where each token has its own.
    projection: [H_kv, 2 * head_dim, hidden].

    The mix [H_kv, tokens, hidden] is as large as H_kv entries, so it is not kept but made again in the backward
    pass, at sources / (2 * head_dim) of the projection's operations. As with the memory's own operations, the
    buffer is kept on ctx, as later layers write to other slots, and gradients add up in one buffer.
    """

    @staticmethod
    def forward(ctx, weights: Tensor, projection: Tensor, chain: Tensor, runs: tuple[Run, ...]) -> Tensor:
        ctx.save_for_backward(weights, projection)
        ctx.runs = runs
        mixed = _mix(weights, runs, projection)
        return torch.bmm(mixed, projection.transpose(1, 2))

    @staticmethod
    def backward(ctx, gradient: Tensor):
        weights, projection = ctx.saved_tensors
        mixed = _mix(weights, ctx.runs, projection)
        projection_gradient = torch.bmm(gradient.transpose(1, 2), mixed)
        del mixed
        mixed_gradient, way = torch.bmm(gradient, projection), _way(weights)
        weights_gradient = torch.empty_like(weights)
        for target, part, run in zip(_split(weights_gradient, ctx.runs), _split(weights, ctx.runs), ctx.runs):
            target.copy_(way.weights_gradient(mixed_gradient, _rows(run.values, projection)))
            if run.buffer.begin_shares(run.first, [1] * run.size):
                run.gradients.zero_()
            way.add_gradients(part, mixed_gradient, _rows(run.gradients, projection))
        return weights_gradient, projection_gradient, gradient.new_zeros(0), None


def _mix(weights: Tensor, runs: Sequence[Run], projection: Tensor) -> Tensor:
    """[H_kv, tokens, hidden]."""
    parts = [_way(weights).mix(part, _rows(run.values, projection)) for part, run in zip(_split(weights, runs), runs)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _split(weights: Tensor, runs: Sequence[Run]) -> tuple[Tensor, ...]:
    """The weights [..., k] of each run."""
    return weights.split([run.size for run in runs], dim=-1)


def _rows(entries: Tensor, projection: Tensor) -> Tensor:
    """[k, 1, tokens * hidden] -> [k, tokens, hidden]."""
    return entries.view(entries.shape[0], -1, projection.shape[-1])


class _SharedWeights:
    """weights [H_kv, k]: one product over all tokens."""

    @staticmethod
    def mix(weights: Tensor, values: Tensor) -> Tensor:
        """values [k, tokens, hidden] -> [H_kv, tokens, hidden]."""
        return torch.mm(weights, values.flatten(1)).unflatten(1, values.shape[1:])

    @staticmethod
    def weights_gradient(mixed_gradient: Tensor, values: Tensor) -> Tensor:
        return torch.mm(mixed_gradient.flatten(1), values.flatten(1).t())

    @staticmethod
    def add_gradients(weights: Tensor, mixed_gradient: Tensor, gradients: Tensor) -> None:
        gradients.flatten(1).addmm_(weights.t(), mixed_gradient.flatten(1))


class _TokenWeights:
    """weights [tokens, H_kv, k]: a product for each token."""

    @staticmethod
    def mix(weights: Tensor, values: Tensor) -> Tensor:
        """values [k, tokens, hidden] -> [H_kv, tokens, hidden]."""
        return torch.bmm(weights, values.transpose(0, 1)).transpose(0, 1)

    @staticmethod
    def weights_gradient(mixed_gradient: Tensor, values: Tensor) -> Tensor:
        return torch.bmm(mixed_gradient.transpose(0, 1), values.permute(1, 2, 0))

    @staticmethod
    def add_gradients(weights: Tensor, mixed_gradient: Tensor, gradients: Tensor) -> None:
        gradients.transpose(0, 1).baddbmm_(weights.transpose(1, 2), mixed_gradient.transpose(0, 1))


def _way(weights: Tensor) -> type[_SharedWeights] | type[_TokenWeights]:
    return _SharedWeights if weights.dim() == 2 else _TokenWeights
