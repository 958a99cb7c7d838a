"""LIMe (Layer-Integrated Memory, arXiv 2502.09245) for `transformers`: the model of an exported lime_dist checkpoint.

`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` loads it. This file is copied into the exported folder
and needs torch and transformers only.

A decoder as LLaMA's, but for the keys and values of a layer that reads earlier ones, a *reader*. What layer i leaves for
readers, its *entry*, is with `lime_entry` kv (v2) its raw, un-rotated keys and values, with hidden (v1) x_i / rms(x_i) of the
residual stream x_i that enters it. A reader mixes the entries of `lime_sources[layer]`, its own last, by its router:

    kv:      (K, V)_h = sum_i sum_h' R[h, i, h'] (K, V)_{i, h'}          R as it is, or an average over i
    hidden:  (K, V)_h = W_h (g * sum_i w[h, i] entry_i)                  w = softmax over i; g the reader's own norm

RoPE comes after that. All of it is of one token at a time, so the cache holds one rotated pair of keys and values a layer,
as LLaMA's does, and entries live as long as a forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PretrainedConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# What releases of transformers call the cache, in arguments and in outputs.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class LimeConfig(PretrainedConfig):
    """LLaMA's sizes, and who reads whom.

    lime_router: static | dynamic | average. lime_entry: kv | hidden. lime_heads, of kv: all | same (a head reads the same heads
    only). lime_head_top_p, of hidden: keep each head's largest weights up to this share.
    lime_sources: for each layer those that it reads, ascending, itself last; None: all.
    lime_blocks: [first, last] of groups of layers that later layers see as one: the last one's entry is their sum for them.
    """

    model_type = "lime"
    keys_to_ignore_at_inference = [_CACHE]

    def __init__(
        self,
        vocab_size: int = 50257,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 16,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        lime_router: str = "static",
        lime_entry: str = "kv",
        lime_heads: str = "all",
        lime_head_top_p: float | None = None,
        lime_sources: list[list[int]] | None = None,
        lime_blocks: list[list[int]] | None = None,
        **others: Any,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads
        self.max_position_embeddings, self.rope_theta, self.rms_norm_eps = (
            max_position_embeddings,
            rope_theta,
            rms_norm_eps,
        )
        self.initializer_range, self.use_cache = initializer_range, use_cache
        self.lime_router, self.lime_entry, self.lime_heads = lime_router, lime_entry, lime_heads
        self.lime_head_top_p, self.lime_blocks = lime_head_top_p, lime_blocks or []
        self.lime_sources = lime_sources or [list(range(layer + 1)) for layer in range(num_hidden_layers)]
        others.pop("head_dim", None)
        super().__init__(**others)


class LimeRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# ---- entries


class Entries:
    """What the layers of one forward pass have left, and their sums over blocks."""

    def __init__(self, config: LimeConfig):
        self._entries: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._blocks = {last: range(first, last + 1) for first, last in config.lime_blocks}

    def write(self, layer: int, entry: Tensor) -> None:
        self._entries[layer] = entry

    def read(self, reader: int, sources: tuple[int, ...], device: torch.device) -> Tensor:
        """[sources, ...]"""
        return torch.stack([self._seen(reader, source).to(device) for source in sources])

    def _seen(self, reader: int, source: int) -> Tensor:
        block = self._blocks.get(source)
        if block is None or reader in block:
            return self._entries[source]
        if source not in self._sums:
            first, *others = (self._entries[layer] for layer in block)
            self._sums[source] = sum((other.to(first.device) for other in others), first)
        return self._sums[source]


class StaticRouter(nn.Module):
    """kv: [heads, sources, heads], or [heads, sources] where heads read the same heads. hidden: [heads, sources] before softmax."""

    def __init__(self, config: LimeConfig, num_sources: int):
        super().__init__()
        heads = config.num_key_value_heads
        across_heads = config.lime_entry == "kv" and config.lime_heads == "all"
        shape = (heads, num_sources, heads) if across_heads else (heads, num_sources)
        self.weight = nn.Parameter(torch.zeros(shape))


class DynamicRouter(nn.Module):
    """hidden: a linear map of the reader's own entry under its own norm, [heads * sources, hidden], before softmax."""

    def __init__(self, config: LimeConfig, num_sources: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_key_value_heads * num_sources, config.hidden_size))


def pruned(shares: Tensor, top_p: float) -> Tensor:
    """Shares [..., sources], of which the largest that together reach `top_p` stay and again sum to 1."""
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(shares).scatter(-1, order, ordered.masked_fill(before >= top_p, 0))
    return kept / kept.sum(-1, keepdim=True)


# ---- layers


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, in rotate-half form, of [batch, heads, tokens, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Pass:
    """What the layers of one forward pass share."""

    def __init__(
        self, config: LimeConfig, position_ids: Tensor, embedded: Tensor, mask: Tensor | None, cache: Cache | None
    ):
        self.entries, self.cache, self._mask = Entries(config), cache, mask
        self._past = int(cache.get_seq_length()) if cache is not None else 0
        dim, device = config.head_dim, embedded.device
        frequencies = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
        angles = position_ids.to(device)[:, None, :, None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)  # [batch, 1, tokens, head_dim]
        self._cos, self._sin = angles.cos().to(embedded.dtype), angles.sin().to(embedded.dtype)
        self._made: dict[tuple[int, torch.device], Tensor | None] = {}

    def rotated(self, x: Tensor) -> Tensor:
        return rotate(x, self._cos.to(x.device), self._sin.to(x.device))

    def new_positions(self, keys: Tensor) -> Tensor:
        """For caches of fixed length, which in earlier releases do not know where they are."""
        return torch.arange(self._past, self._past + keys.shape[2], device=keys.device)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[batch, heads, tokens, head_dim]"""
        grouped, new, seen = queries.shape[1] != keys.shape[1], queries.shape[2], keys.shape[2]
        mask = self._visible(new, seen, queries)
        causal = mask is None and new > 1
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal, enable_gqa=grouped)

    def _visible(self, new: int, seen: int, queries: Tensor) -> Tensor | None:
        """Which of the keys each query sees; None: all up to its own. A cache of fixed length has keys behind the last token."""
        if self._mask is not None and self._mask.dim() == 4:
            mask = self._mask.to(queries.device)[..., :seen]
            return mask if mask.dtype == torch.bool else mask.to(queries.dtype)
        if self._mask is None and self._past + new == seen and (self._past == 0 or new == 1):
            return None
        key = seen, queries.device
        if key not in self._made:
            self._made[key] = self._make_visible(new, seen, queries.device)
        return self._made[key]

    def _make_visible(self, new: int, seen: int, device: torch.device) -> Tensor:
        own = torch.arange(self._past, self._past + new, device=device)
        visible = (torch.arange(seen, device=device) <= own[:, None])[None, None]
        if self._mask is not None:
            given = self._mask.to(device, torch.bool)[:, :seen]
            given = F.pad(given, (0, seen - given.shape[1]), value=True)
            visible = visible & given[:, None, None]
        # A padded token that saw nothing would be no number, which spreads.
        return visible | ~visible.any(-1, keepdim=True)


class LimeAttention(nn.Module):
    def __init__(self, config: LimeConfig, layer: int):
        super().__init__()
        heads, self._kv_heads, self._head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._layer, self._sources = layer, tuple(config.lime_sources[layer])
        self._of_hidden, self._eps, self._top_p = (
            config.lime_entry == "hidden",
            config.rms_norm_eps,
            config.lime_head_top_p,
        )
        self.q_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self._kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self._kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=False)
        self._is_reader = len(self._sources) > 1
        self.lime_router: StaticRouter | DynamicRouter | None = None
        if self._is_reader and config.lime_router != "average":
            kind = DynamicRouter if config.lime_router == "dynamic" else StaticRouter
            self.lime_router = kind(config, len(self._sources))
        if self._is_reader and self._of_hidden:
            self.depth_norm = LimeRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, residual: Tensor, normed: Tensor, run: Pass) -> Tensor:
        keys, values = (self._from_hidden if self._of_hidden else self._from_keys_values)(residual, normed, run)
        queries, keys = run.rotated(self._heads(self.q_proj(normed))), run.rotated(keys)
        if run.cache is not None:
            keys, values = run.cache.update(keys, values, self._layer, {"cache_position": run.new_positions(keys)})
        return self.o_proj(run.attend(queries, keys, values).transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]"""
        return projected.unflatten(-1, (-1, self._head_dim)).transpose(1, 2)

    def _from_keys_values(self, residual: Tensor, normed: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        keys, values = self._heads(self.k_proj(normed)), self._heads(self.v_proj(normed))
        run.entries.write(self._layer, torch.cat((keys, values), dim=-1))
        if not self._is_reader:
            return keys, values
        entries = run.entries.read(
            self._layer, self._sources, normed.device
        )  # [sources, batch, heads, tokens, 2 head_dim]
        if self.lime_router is None:
            mixed = entries.mean(0)
        elif self.lime_router.weight.dim() == 2:
            mixed = torch.einsum("hs,sbhtd->bhtd", self.lime_router.weight, entries)
        else:
            mixed = torch.einsum("rsh,sbhtd->brtd", self.lime_router.weight, entries)
        keys, values = mixed.chunk(2, dim=-1)
        return keys, values

    def _from_hidden(self, residual: Tensor, normed: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        own = F.rms_norm(residual, residual.shape[-1:], None, self._eps)
        run.entries.write(self._layer, own)
        if not self._is_reader:
            return self._heads(self.k_proj(normed)), self._heads(self.v_proj(normed))
        entries = run.entries.read(self._layer, self._sources, normed.device)  # [sources, batch, tokens, hidden]
        weights = self._weights(own)
        equation = "hs,sbtd->bhtd" if weights.dim() == 2 else "bths,sbtd->bhtd"
        mixed = torch.einsum(equation, weights, entries) * self.depth_norm.weight
        return self._project(mixed, self.k_proj), self._project(mixed, self.v_proj)

    def _weights(self, own: Tensor) -> Tensor:
        """[heads, sources], or [batch, tokens, heads, sources] of a dynamic router."""
        if self.lime_router is None:
            return own.new_full((self._kv_heads, len(self._sources)), 1 / len(self._sources))
        shares = self._scores(own, self.lime_router).softmax(-1, dtype=torch.float32)
        return (shares if self._top_p is None else pruned(shares, self._top_p)).to(own.dtype)

    def _scores(self, own: Tensor, router: StaticRouter | DynamicRouter) -> Tensor:
        if isinstance(router, StaticRouter):
            return router.weight
        return F.linear(own * self.depth_norm.weight, router.weight).unflatten(-1, (self._kv_heads, -1))

    def _project(self, mixed: Tensor, projection: nn.Linear) -> Tensor:
        """Each head's own mixture [batch, heads, tokens, hidden] by the rows of that head."""
        return mixed @ projection.weight.unflatten(0, (self._kv_heads, -1)).transpose(1, 2)


class LimeMLP(nn.Module):
    def __init__(self, config: LimeConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, normed: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class LimeDecoderLayer(nn.Module):
    def __init__(self, config: LimeConfig, layer: int):
        super().__init__()
        self.input_layernorm = LimeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LimeAttention(config, layer)
        self.post_attention_layernorm = LimeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LimeMLP(config)

    def forward(self, residual: Tensor, run: Pass) -> Tensor:
        residual = residual + self.self_attn(residual, self.input_layernorm(residual), run)
        return residual + self.mlp(self.post_attention_layernorm(residual))


# ---- models


class LimePreTrainedModel(PreTrainedModel):
    config: LimeConfig
    config_class = LimeConfig
    base_model_prefix = "model"
    _no_split_modules = ["LimeDecoderLayer"]
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A router begins with its own layer alone."""
        super()._init_weights(module)
        if getattr(getattr(module, "weight", None), "_is_hf_initialized", False):
            return  # it was loaded
        if isinstance(module, StaticRouter) and self.config.lime_entry == "kv":
            module.weight.zero_()
            module.weight[:, -1] = torch.eye(len(module.weight)) if module.weight.dim() == 3 else 1.0
        elif isinstance(module, (StaticRouter, DynamicRouter)):
            module.weight.zero_()


class LimeModel(LimePreTrainedModel):
    def __init__(self, config: LimeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LimeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = LimeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        residual = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = int(cache.get_seq_length()) if cache is not None else 0
            position_ids = torch.arange(past, past + residual.shape[1], device=residual.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2 and bool(attention_mask.all()):
            attention_mask = None
        run = Pass(self.config, position_ids, residual, attention_mask, cache)
        hidden_states = [residual]
        for layer in self.layers:
            residual = layer(residual, run)
            hidden_states.append(residual)
        residual = hidden_states[-1] = self.norm(residual)
        keeps = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs: dict[str, Any] = {"last_hidden_state": residual, _CACHE: cache}
        return BaseModelOutputWithPast(**outputs, hidden_states=tuple(hidden_states) if keeps else None)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


class LimeForCausalLM(LimePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LimeConfig):
        super().__init__(config)
        self.model = LimeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """labels: ids [batch, seq], -100 for none; each token predicts the next one's."""
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others)
        outputs: dict[str, Any] = {"loss": loss, "logits": logits, _CACHE: found.get(_CACHE)}
        output = CausalLMOutputWithPast(**outputs, hidden_states=found.hidden_states)
        return output.to_tuple() if return_dict is False else output
