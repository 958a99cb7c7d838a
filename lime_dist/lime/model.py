"""One stage of the model; the whole model is the stage that holds every layer.

`LimeStage` over `PlainParts` and all layers is the single-process model that everything distributed is
compared with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lime_dist.config import ModelConfig
from lime_dist.depth.pattern import Pattern
from lime_dist.depth.routing import Routing
from lime_dist.lime.depth_memory import DepthMemory
from lime_dist.lime.hidden import HiddenDepth
from lime_dist.lime.key_value import KeyValueDepth
from lime_dist.lime.layers import DecoderLayer, KeyValueCache, Pass, RMSNorm, rope_tables
from lime_dist.lime.parts import Parts, PlainParts
from lime_dist.plan.parameters import ParameterSpec, plan_parameters
from lime_dist.plan.transfer import ChunkTransfer, plan_transfer


class LimeStage(nn.Module):
    """Layers `layers` of the model, with the embedding before the first and the head after the last.

    transfer: what the stage receives, adds up and sends of entries and partial sums.
    sum_dtype: of sums over stages; None for the parts' own.
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
        self.config, self.transfer, self.stage_layers = model, transfer, layers
        self._parts, self.recompute = parts, recompute
        self.dtype, self.device, self._sum_dtype = parts.dtype, parts.device, sum_dtype or parts.dtype
        self.is_first_stage, self.is_last_stage = layers.start == 0, layers.stop == model.num_layers
        self.entries = transfer.own_entries(layers)
        self.embed_tokens = parts.embedding(model.vocab_size, model.hidden_size) if self.is_first_stage else None
        depth = KeyValueDepth if transfer.pattern.routing is Routing.KEY_VALUE else HiddenDepth
        self._depth = depth(model, transfer, layers, parts)
        self.layers = nn.ModuleDict(
            {str(layer): DecoderLayer(model, self._depth.attention(layer), parts) for layer in layers}
        )
        self.partial_routers = nn.ModuleDict(
            {str(reader): router for reader, router in self._depth.partial_routers.items()}
        )
        if self.is_last_stage:
            self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps, parts)
            tied: Any = self.embed_tokens.weight if self.embed_tokens is not None and model.tie_embeddings else None
            self.lm_head = parts.head(model.hidden_size, model.vocab_size, tied)

    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """What each parameter of this stage is in terms of logical tensors."""
        return plan_parameters(
            self.config,
            self.transfer,
            self.stage_layers,
            tp=self._parts.tp_size,
            tp_rank=self._parts.tp_rank,
            vocab_rows=self._parts.vocab_rows(self.config.vocab_size),
        )

    def rows(self, num_tokens: int) -> int:
        """Rows of the microbatch, padded so that every tensor rank has as many."""
        tp = self._parts.tp_size
        return (num_tokens + tp - 1) // tp * tp

    def new_memory(self, num_tokens: int) -> DepthMemory:
        """An empty depth memory for one microbatch of `num_tokens` tokens."""
        heads, row_size = self.transfer.pattern.routing.entry_shape(
            rows=self.rows(num_tokens) // self._parts.tp_size,
            hidden_size=self.config.hidden_size,
            num_kv_heads=self.config.kv_heads,
            head_dim=self.config.head_dim,
        )
        return DepthMemory(
            self.transfer,
            self.entries,
            self.transfer.own_blocks(self.stage_layers),
            heads,
            row_size,
            dtype=self.dtype,
            sum_dtype=self._sum_dtype,
            device=self.device,
        )

    def forward(
        self,
        inputs: Tensor,
        batch_size: int,
        seq_length: int,
        memory: DepthMemory,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Carry one microbatch through the stage's layers.

        inputs: token ids [batch, seq] on the first stage, the residual stream elsewhere.
        memory: from `new_memory`, what was received in its place.
        Returns the residual stream, or on the last stage with `targets` [batch, seq] the loss, and the
        memory's last token: both to be differentiated in one joint backward. Collective: tp group.
        """
        start = cache.length if cache is not None else 0
        cos, sin = rope_tables(start, seq_length, self.config.head_dim, self.config.rope_theta, self.device)
        run = Pass(batch_size, seq_length, cos.to(self.dtype), sin.to(self.dtype), memory, cache)
        residual = self.embed_tokens(self._padded(inputs.flatten())) if self.embed_tokens is not None else inputs
        token = self._depth.add_received(memory, memory.start())
        for layer in self.layers.values():
            if self.recompute and torch.is_grad_enabled():
                residual, token = checkpoint(layer, residual, token, run, use_reentrant=False, preserve_rng_state=False)
            else:
                residual, token = layer(residual, token, run)
        if targets is not None and self.is_last_stage:
            return self._loss(residual, targets), token
        return residual, self._depth.add_own(memory, token)

    def logits(self, residual: Tensor) -> Tensor:
        """[tokens, padded vocabulary / tp], rows past the tokens included. Last stage only."""
        return self.lm_head(self.norm(residual))

    def whole_logits(self, residual: Tensor) -> Tensor:
        """[tokens, vocab_size], rows past the tokens included. Last stage only. Collective: tp group."""
        return self._parts.gather_logits(self.logits(residual), self.config.vocab_size)

    def _loss(self, residual: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy over the microbatch's tokens."""
        losses = self._parts.cross_entropy(self.logits(residual), self._padded(targets.flatten()))
        return losses[: targets.numel()].mean()

    def _padded(self, ids: Tensor) -> Tensor:
        missing = self.rows(ids.numel()) - ids.numel()
        return nn.functional.pad(ids, (0, missing)) if missing else ids


def plain_model(
    model: ModelConfig, pattern: Pattern, parts: PlainParts | None = None, *, recompute: bool = False
) -> LimeStage:
    """The whole model on one device."""
    layers = range(model.num_layers)
    transfer = plan_transfer(pattern, (layers,), policy="relay").chunk(0)
    return LimeStage(model, transfer, layers, parts or PlainParts(), recompute=recompute)


def model_logits(model: LimeStage, tokens: Tensor) -> Tensor:
    """Logits [batch, seq, vocab] of token ids [batch, seq] through the whole model on one device."""
    residual, _ = model(tokens, *tokens.shape, model.new_memory(tokens.numel()))
    return model.whole_logits(residual).unflatten(0, tuple(tokens.shape))


def model_loss(model: LimeStage, tokens: Tensor) -> Tensor:
    """Mean next-token cross entropy of [batch, seq + 1] through the whole model on one device."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    loss, _ = model(inputs, *inputs.shape, model.new_memory(inputs.numel()), targets)
    return loss
