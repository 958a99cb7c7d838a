"""One chunk of the model; the whole model is the chunk that holds every layer.

`LimeChunk` over `PlainParts` and all layers is the single-process model that everything distributed is
compared with. `LimeStage` holds the chunks of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lime_dist.config import ModelConfig
from lime_dist.depth.hidden import AverageHidden, DynamicRouting, StaticRouting
from lime_dist.depth.key_value import AverageKeyValue, KeyValueRouting, NoRouting
from lime_dist.depth.pattern import Pattern
from lime_dist.depth.routing import Routing
from lime_dist.lime.depth import Depth
from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.hidden import HiddenDepth
from lime_dist.lime.key_value import KeyValueDepth
from lime_dist.lime.layers import DecoderLayer, KeyValueCache, Pass, RMSNorm, RotaryTables
from lime_dist.lime.microbatch import Examples, read_microbatch, visible
from lime_dist.lime.parts import Parts, PlainParts
from lime_dist.plan.parameters import plan_parameters
from lime_dist.plan.tensors import ParameterSpec
from lime_dist.plan.transfer import ChunkTransfer, plan_transfer

# Each kind's half that runs on a device.
DEPTHS: dict[type[Routing], type[Depth]] = {
    KeyValueRouting: KeyValueDepth,
    AverageKeyValue: KeyValueDepth,
    NoRouting: KeyValueDepth,
    StaticRouting: HiddenDepth,
    DynamicRouting: HiddenDepth,
    AverageHidden: HiddenDepth,
}


class LimeChunk(nn.Module):
    """Layers `layers` of the model, with the embedding before the first and the head after the last.

    transfer: what the chunk receives, adds up and sends of entries and partial sums.
    sum_dtype: of sums over chunks; None for the parts' own.
    """

    def __init__(
        self,
        model: ModelConfig,
        transfer: ChunkTransfer,
        layers: range,
        parts: Parts,
        *,
        sum_dtype: torch.dtype | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        self.config, self.transfer, self.chunk_layers = model, transfer, layers
        self._parts, self.recompute = parts, recompute
        self.dtype, self.device, self._sum_dtype = parts.dtype, parts.device, sum_dtype or parts.dtype
        self.is_first, self.is_last = layers.start == 0, layers.stop == model.num_layers
        self.entries = transfer.own_entries(layers)
        self._rotary = RotaryTables(model.head_dim, model.rope_theta, parts.dtype, parts.device)
        self.embed_tokens = parts.embedding(model.vocab_size, model.hidden_size) if self.is_first else None
        self._depth = DEPTHS[type(transfer.pattern.routing)](model, transfer, layers, parts)
        self.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(model, self._depth.attention(layer), parts) for layer in layers}
        )
        self.partial_routers = nn.ModuleDict(
            {str(reader): router for reader, router in self._depth.partial_routers.items()}
        )
        if self.is_last:
            self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps, parts)
            tied: Any = self.embed_tokens.weight if self.embed_tokens is not None and model.tie_embeddings else None
            self.lm_head = parts.head(model.hidden_size, model.vocab_size, tied)

    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """What each parameter of this chunk is in terms of logical tensors."""
        return plan_parameters(
            self.config,
            self.transfer,
            self.chunk_layers,
            tp=self._parts.tp_size,
            tp_rank=self._parts.tp_rank,
            vocab_rows=self._parts.vocab_rows(self.config.vocab_size),
        )

    def rows(self, num_tokens: int) -> int:
        """Rows of the microbatch, padded so that every tensor rank has as many."""
        tp = self._parts.tp_size
        return (num_tokens + tp - 1) // tp * tp

    def new_memory(self, num_tokens: int, **links: Any) -> DepthMemory:
        """An empty depth memory for one microbatch of `num_tokens` tokens; links: `kept` and `reach` of `DepthMemory`."""
        rows = self.rows(num_tokens) // self._parts.tp_size
        heads, row_size = self.transfer.pattern.routing.entry_shape(self.config, rows)
        return DepthMemory(
            self.transfer,
            self.entries,
            self.transfer.own_blocks(self.chunk_layers),
            heads,
            row_size,
            dtype=self.dtype,
            sum_dtype=self._sum_dtype,
            device=self.device,
            **links,
        )

    def forward(
        self,
        inputs: Tensor,
        batch_size: int,
        seq_length: int,
        memory: DepthMemory,
        targets: Tensor | None = None,
        examples: Examples | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Carry one microbatch through the chunk's layers.

        inputs: token ids [batch, seq] on the first chunk, the residual stream elsewhere.
        memory: from `new_memory`, what was received in its place.
        Returns the residual stream, or on the last chunk with `targets` [batch, seq] the loss, and the end of
        the memory's chain: both to be differentiated in one joint backward. Collective: tp group.
        """
        start = cache.length if cache is not None else 0
        documents = examples.documents if examples is not None else None
        seen = visible(documents) if documents is not None else None
        run = Pass(batch_size, seq_length, *self._rotary.at(range(start, start + seq_length)), memory, cache, seen)
        residual = self.embed_tokens(self._padded(inputs.flatten())) if self.embed_tokens is not None else inputs
        chain = self._depth.add_received(memory, memory.start())
        for layer in self.layers.values():
            if self.recompute and torch.is_grad_enabled():
                residual, chain = checkpoint(layer, residual, chain, run, use_reentrant=False, preserve_rng_state=False)
            else:
                residual, chain = layer(residual, chain, run)
        if targets is not None and self.is_last:
            return self._loss(residual, targets, examples.weights if examples is not None else None), chain
        return residual, self._depth.add_own(memory, chain)

    def logits(self, residual: Tensor) -> Tensor:
        """[tokens, padded vocabulary / tp], rows past the tokens included. Last chunk only."""
        return self.lm_head(self.norm(residual))

    def whole_logits(self, residual: Tensor) -> Tensor:
        """[tokens, vocab_size], rows past the tokens included. Last chunk only. Collective: tp group."""
        return self._parts.gather_logits(self.logits(residual), self.config.vocab_size)

    def _loss(self, residual: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Cross entropy: the mean over the microbatch's tokens, or their sum by `weights`."""
        losses = self._parts.cross_entropy(self.logits(residual), self._padded(targets.flatten()))[: targets.numel()]
        return losses.mean() if weights is None else losses @ weights.flatten()

    def _padded(self, ids: Tensor) -> Tensor:
        missing = self.rows(ids.numel()) - ids.numel()
        return nn.functional.pad(ids, (0, missing)) if missing else ids


class LimeStage(nn.Module):
    """The chunks of one pipeline rank, by chunk."""

    def __init__(self, chunks: Mapping[int, LimeChunk]):
        super().__init__()
        self.chunks = nn.ModuleDict({str(chunk): module for chunk, module in chunks.items()})

    def chunk(self, chunk: int) -> LimeChunk:
        return cast(LimeChunk, self.chunks[str(chunk)])

    def forward(self, chunk: int, *args: Any) -> tuple[Tensor, Tensor]:
        """`LimeChunk.forward` of one chunk: one module for whatever wraps all of a rank's parameters."""
        return self.chunks[str(chunk)](*args)

    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """What each parameter of this stage is in terms of logical tensors."""
        return tuple(
            replace(spec, name=f"chunks.{chunk}.{spec.name}")
            for chunk, module in self.chunks.items()
            for spec in cast(LimeChunk, module).parameter_specs()
        )


def plain_model(
    model: ModelConfig, pattern: Pattern, parts: PlainParts | None = None, *, recompute: bool = False
) -> LimeChunk:
    """The whole model on one device."""
    layers = range(model.num_layers)
    transfer = plan_transfer(pattern, (layers,), policy="relay").chunk(0)
    return LimeChunk(model, transfer, layers, parts or PlainParts(), recompute=recompute)


def model_logits(model: LimeChunk, tokens: Tensor) -> Tensor:
    """Logits [batch, seq, vocab] of token ids [batch, seq] through the whole model on one device."""
    residual, _ = model(tokens, *tokens.shape, model.new_memory(tokens.numel()))
    return model.whole_logits(residual).unflatten(0, tuple(tokens.shape))


def model_loss(model: LimeChunk, tokens: Tensor) -> Tensor:
    """Mean next-token cross entropy of [batch, seq + 1], ids or ids with marks, through the whole model on one device."""
    batch = read_microbatch(tokens)
    memory = model.new_memory(batch.inputs.numel())
    loss, _ = model(batch.inputs, *batch.inputs.shape, memory, batch.targets, batch.examples)
    return loss
