"""What is collected from a model equals a plain recomputation, and the model is as before."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lime_dist.analysis.activations import collect, mean_token_weights
from lime_dist.config import Config, check_config, parse_config
from lime_dist.lime.layers import rope_tables, rotate
from lime_dist.lime.model import LimeChunk, model_logits, plain_model
from lime_dist.lime.values import gather_logical, specified_parameters

BASE = {"model": dict(num_layers=4, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, vocab_size=40)}
# fp32, the order of sums only.
TOLERANCE = 1e-5


def make(*overrides: str) -> tuple[LimeChunk, Config]:
    """Large random weights, so that every router matters."""
    config = check_config(parse_config(BASE, overrides))
    model = plain_model(config.model, config.pattern)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for _, parameter in specified_parameters(model):
            parameter.normal_(0, 0.4, generator=generator)
    return model, config


def make_tokens() -> Tensor:
    return torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(3))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain


def close(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and float((actual - expected).abs().max()) < TOLERANCE * float(
        expected.abs().max()
    )


def recomputed(config: Config, weights: dict[str, Tensor], tokens: Tensor) -> dict[str, list[Tensor]]:
    """LIMe v2 (or LLaMA, where there is no router), one head and one source at a time: by kind and layer."""
    model, (batch, seq) = config.model, tokens.shape
    cos, sin = rope_tables(0, seq, model.head_dim, model.rope_theta, tokens.device)
    x, found = weights["embed_tokens.weight"][tokens], {"hidden_states": [], "values": [], "raw_values": []}
    raw: list[tuple[Tensor, Tensor]] = []
    for layer in range(model.num_layers):
        prefix = f"layers.{layer}."
        normed = rms_norm(x, weights[prefix + "input_layernorm.weight"])

        def heads(name: str, count: int, prefix: str = prefix, normed: Tensor = normed) -> Tensor:
            return (normed @ weights[f"{prefix}self_attn.{name}.weight"].t()).view(batch, seq, count, model.head_dim)

        raw.append((heads("k_proj", model.kv_heads), heads("v_proj", model.kv_heads)))
        router = weights.get(f"{prefix}self_attn.lime_router.weight")
        routed = []
        for which in (0, 1):
            own = raw[-1][which]
            if router is not None:
                sources = config.pattern.sources[layer]
                own = torch.stack(
                    [
                        sum(
                            router[head, place, other] * raw[source][which][:, :, other]
                            for place, source in enumerate(sources)
                            for other in range(model.kv_heads)
                        )
                        for head in range(model.kv_heads)
                    ],
                    dim=2,
                )
            routed.append(own)
        found["raw_values"].append(raw[-1][1].flatten(2))
        found["values"].append(routed[1].flatten(2))
        queries = rotate(heads("q_proj", model.num_heads).transpose(1, 2), cos, sin)
        keys, values = rotate(routed[0].transpose(1, 2), cos, sin), routed[1].transpose(1, 2)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ weights[prefix + "self_attn.o_proj.weight"].t()
        normed = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"])
        gate, up = (normed @ weights[f"{prefix}mlp.{name}_proj.weight"].t() for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ weights[prefix + "mlp.down_proj.weight"].t()
        found["hidden_states"].append(x)
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides", [(), ("depth.pattern=first:1",), ("depth.router=none",), ("depth.pattern={3: [1]}",)], ids=str
)
def test_equals_a_plain_recomputation(overrides: tuple[str, ...]) -> None:
    model, config = make(*overrides)
    tokens = make_tokens()
    expected = recomputed(config, gather_logical(model, lambda parameter: parameter), tokens)
    actual = collect(model, tokens)
    for kind, layers in expected.items():
        assert sorted(actual[kind]) == list(range(4))
        for layer, states in enumerate(layers):
            assert close(actual[kind][layer], states), (kind, layer)


@torch.no_grad()
def test_values_of_hidden_entries() -> None:
    """V_h = W_V,h sum_i softmax(w)_h,i g x_i / rms(x_i) (arXiv 2502.09245v1); a reader has no raw values."""
    model, config = make("depth.entry=hidden", "model.num_kv_heads=4")
    weights, tokens = gather_logical(model, lambda parameter: parameter), make_tokens()
    found = collect(model, tokens)
    inputs = [weights["embed_tokens.weight"][tokens], *(found["hidden_states"][layer] for layer in range(3))]
    assert sorted(found["values"]) == [0, 1, 2, 3] and sorted(found["raw_values"]) == [0]
    for layer in (1, 2, 3):
        prefix = f"layers.{layer}.self_attn."
        mix = weights[prefix + "lime_router.weight"].softmax(-1)
        entries = torch.stack([rms_norm(x, weights[prefix + "depth_norm.weight"]) for x in inputs[: layer + 1]])
        projection = weights[prefix + "v_proj.weight"].view(4, config.model.head_dim, -1)
        expected = torch.einsum("hs,sbtc,hdc->bthd", mix, entries, projection).flatten(2)
        assert close(found["values"][layer], expected)


@torch.no_grad()
def test_weights_of_dynamic_routers_are_means_over_tokens() -> None:
    model, _ = make("depth.entry=hidden", "depth.router=dynamic", "model.num_kv_heads=4")
    batches = [make_tokens(), make_tokens().flip(0, 1)[:, :5]]
    found = mean_token_weights(model, batches)
    assert {layer: weights.shape for layer, weights in found.items()} == {layer: (4, layer + 1) for layer in (1, 2, 3)}
    each = [mean_token_weights(model, [batch]) for batch in batches]
    for layer, weights in found.items():
        assert weights.sum(-1) == pytest.approx(1.0)
        assert weights == pytest.approx((14 * each[0][layer] + 10 * each[1][layer]) / 24)
    for name, parameter in model.named_parameters():
        if "lime_router" in name:
            parameter.zero_()
    assert mean_token_weights(model, batches)[3] == pytest.approx(1 / 4)


@torch.no_grad()
def test_no_hook_stays() -> None:
    model, _ = make("depth.entry=hidden", "depth.router=dynamic", "model.num_kv_heads=4")
    before = model_logits(model, make_tokens())
    collect(model, make_tokens())
    mean_token_weights(model, [make_tokens()])
    assert torch.equal(model_logits(model, make_tokens()), before)
    assert not any(module._forward_hooks for module in model.modules())
