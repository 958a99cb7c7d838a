"""Hidden-state routing (LIMe v1): the model, its plan, its parameters and its checkpoints against the definition."""

from __future__ import annotations

import shlex
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lime_dist.config import Config, check_config, parse_config
from lime_dist.depth.hidden import HIDDEN_DYNAMIC, HIDDEN_STATIC, StaticRouting, pruned
from lime_dist.depth.key_value import KEY_VALUE
from lime_dist.depth.routing import Read, Routing
from lime_dist.errors import ConfigError
from lime_dist.generate import Sampling, generate_ids
from lime_dist.lime.layers import KeyValueCache, rope_tables, rotate
from lime_dist.lime.model import LimeChunk, model_logits, model_loss, plain_model
from lime_dist.lime.values import gather_logical, initial_values, initialize
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.selection import mean_magnitudes
from lime_dist.plan.stages import plan_transfer_of
from lime_dist.plan.tensors import Cutter, LogicalTensor, Role
from lime_dist.plan.transfer import plan_transfer
from lime_dist.training.optim import build_optimizer

# fp32 with 24 bits: the order of sums only.
TOLERANCE = 1e-5
SMALLEST = 1e-3  # of a gradient compared relative to itself: a router whose heads keep one source each has nothing but rounding

BASE: dict[str, Any] = {
    "model": {
        "num_layers": 5, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 61,
    },
    "depth": {"entry": "hidden"},
    "data": {"seq_length": 7, "global_batch_size": 2},
}  # fmt: skip


def make_config(text: str = "") -> Config:
    config = parse_config(BASE, shlex.split(text))
    return check_config(config, config.layout.world_size)


def make_model(config: Config, recompute: bool = False) -> LimeChunk:
    """Gains and weights that are far from the initial ones, so that one used in another's place shows."""
    model = plain_model(config.model, config.pattern, recompute=recompute)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            if "lime_router" in name:
                parameter.normal_(0, 1, generator=generator)
    return model


def make_tokens(length: int = 8) -> Tensor:
    return torch.randint(61, (2, length), generator=torch.Generator().manual_seed(3))


# ---- the definition, written out


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain


def naive_loss(weights: dict[str, Tensor], config: Config, tokens: Tensor) -> Tensor:
    """From whole logical tensors, an entry, a head and a sequence at a time; arXiv 2502.09245v1."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    losses = []
    for row, target in zip(inputs, targets):
        entries, x = [], weights["embed_tokens.weight"][row]  # [seq, hidden]
        for layer in range(config.model.num_layers):
            entries.append(x)
            x = naive_layer(weights, config, layer, entries)
        logits = rms_norm(x, weights["norm.weight"], config.model.rms_norm_eps) @ weights["embed_tokens.weight"].t()
        losses.append(F.cross_entropy(logits, target))
    return torch.stack(losses).mean()


def naive_layer(weights: dict[str, Tensor], config: Config, layer: int, entries: list[Tensor]) -> Tensor:
    model, x = config.model, entries[-1]

    def weight(name: str) -> Tensor:
        return weights[f"layers.{layer}.{name}.weight"]

    normed = rms_norm(x, weight("input_layernorm"), model.rms_norm_eps)
    cos, sin = rope_tables(0, len(x), model.head_dim, model.rope_theta, torch.device("cpu"))
    heads = []
    for head in range(model.num_heads):
        kv_head = head // (model.num_heads // model.kv_heads)
        mixed = naive_mix(weight, config, layer, kv_head, entries, normed)
        query = normed @ head_rows(weight("self_attn.q_proj"), head, model.head_dim).t()
        key = mixed @ head_rows(weight("self_attn.k_proj"), kv_head, model.head_dim).t()
        value = mixed @ head_rows(weight("self_attn.v_proj"), kv_head, model.head_dim).t()
        scores = rotate(query, cos, sin) @ rotate(key, cos, sin).t() / model.head_dim**0.5
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ value)
    x = x + torch.cat(heads, -1) @ weight("self_attn.o_proj").t()
    normed = rms_norm(x, weight("post_attention_layernorm"), model.rms_norm_eps)
    inner = F.silu(normed @ weight("mlp.gate_proj").t()) * (normed @ weight("mlp.up_proj").t())
    return x + inner @ weight("mlp.down_proj").t()


def naive_mix(weight: Any, config: Config, layer: int, kv_head: int, entries: list[Tensor], normed: Tensor) -> Tensor:
    """What K and V of one head are projected from: [seq, hidden]."""
    sources = config.pattern.sources[layer]
    if sources == (layer,):
        return normed
    gain, eps = weight("self_attn.depth_norm"), config.model.rms_norm_eps
    if config.depth.router == "dynamic":
        rows = weight("self_attn.lime_router")[kv_head * len(sources) : (kv_head + 1) * len(sources)]
        shares = (rms_norm(entries[-1], gain, eps) @ rows.t()).softmax(-1)  # [seq, sources]
    elif config.depth.router == "average":
        shares = torch.full((len(normed), len(sources)), 1 / len(sources))
    else:
        shares = weight("self_attn.lime_router")[kv_head].softmax(-1).expand(len(normed), -1)
    shares = naive_prune(shares, config.depth.head_top_p)
    blocks = {block[-1]: block for block in config.pattern.blocks}
    members = [[source] if source == layer else blocks.get(source, [source]) for source in sources]
    normed_entries = [sum(rms_norm(entries[member], gain, eps) for member in block) for block in members]
    return sum(shares[:, k, None] * entry for k, entry in enumerate(normed_entries))


def naive_prune(shares: Tensor, top_p: float | None) -> Tensor:
    """Shares [seq, sources], a row at a time."""
    if top_p is None:
        return shares
    rows = []
    for row in shares:
        kept: list[int] = []
        for source in sorted(range(len(row)), key=lambda source: -float(row[source])):
            if sum(float(row[other]) for other in kept) < top_p:
                kept.append(source)
        mask = torch.tensor([source in kept for source in range(len(row))])
        rows.append(row * mask / (row * mask).sum())
    return torch.stack(rows)


def head_rows(matrix: Tensor, head: int, head_dim: int) -> Tensor:
    return matrix[head * head_dim : (head + 1) * head_dim]


CASES = (
    "depth.pattern=full",
    "depth.pattern=first:2",
    "depth.pattern=last:2",
    "depth.pattern=stride:2 model.num_kv_heads=4",
    "depth.pattern={3:[0],4:[1,2]}",  # layers 1 and 2 have no router, and layers 0 to 2 are read
    "depth.pattern=block:2",
    "model.num_kv_heads=1",
)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "router", ["static", "dynamic", "average", "static depth.head_top_p=0.6", "dynamic depth.head_top_p=0.8"]
)
@pytest.mark.parametrize("text", CASES)
def test_loss_and_every_gradient_are_those_of_the_definition(text: str, router: str, recompute: bool) -> None:
    config, tokens = make_config(f"{text} depth.router={router}"), make_tokens()
    model = make_model(config, recompute)
    loss = model_loss(model, tokens)
    loss.backward()
    actual = gather_logical(model, lambda parameter: parameter.grad)
    assert any("lime_router" in name for name in actual) is ("average" not in router)

    weights = {name: value.detach().clone() for name, value in gather_logical(model, lambda p: p).items()}
    for value in weights.values():
        value.requires_grad_()
    expected = naive_loss(weights, config, tokens)
    expected.backward()

    assert float(loss) == pytest.approx(float(expected), rel=TOLERANCE)
    assert actual.keys() == weights.keys() == logical_tensors(config.model, config.pattern).keys()
    for name, value in weights.items():
        largest = max(float(value.grad.abs().max()), SMALLEST)
        assert (actual[name] - value.grad).abs().max() < TOLERANCE * largest, name


@pytest.mark.parametrize("router", ["static", "dynamic"])
def test_decoding_token_by_token_gives_the_logits_of_the_whole(router: str) -> None:
    config, tokens = make_config(f"depth.router={router}"), make_tokens()
    model = make_model(config)
    cache, pieces = KeyValueCache(), []
    with torch.no_grad():
        whole = model_logits(model, tokens)
        for piece in tokens.split((5, 1, 2), dim=1):
            residual, _ = model(piece, *piece.shape, model.new_memory(piece.numel()), cache=cache)
            pieces.append(model.whole_logits(residual).unflatten(0, tuple(piece.shape)))
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=TOLERANCE)
    assert {tuple(keys.shape) for keys, _ in cache.kv.values()} == {(2, 2, 8, 8)}  # LLaMA's: batch, KV heads, tokens
    assert len(list(generate_ids(model, [1, 2, 3], Sampling(temperature=0), 4))) == 4


# ---- parameters


def test_names_shapes_and_roles() -> None:
    for router, shape in (("static", (2, 3)), ("dynamic", (2 * 3, 32))):
        config = make_config(f"depth.router={router} depth.pattern=last:2")
        model = make_model(config)
        specs = {spec.name: spec.shape for spec in model.parameter_specs()}
        assert specs == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        tensors = logical_tensors(config.model, config.pattern)
        assert "layers.0.self_attn.lime_router.weight" not in tensors
        assert "layers.0.self_attn.depth_norm.weight" not in tensors
        assert tensors["layers.3.self_attn.k_proj.weight"].shape == (16, 32)
        assert tensors["layers.3.self_attn.depth_norm.weight"] == LogicalTensor(
            "layers.3.self_attn.depth_norm.weight", (32,), Role.NORM
        )
        found = tensors["layers.3.self_attn.lime_router.weight"]
        assert (found.role, found.shape) == (Role.ROUTER, shape)


def test_initial_values() -> None:
    model, sources = (
        make_config("model.hidden_size=100 model.num_heads=50 model.num_kv_heads=50").model,
        tuple(range(40)),
    )
    static, dynamic = (
        initial_values(routing.router(Cutter(1, 0), "a", model, Read(39, sources, sources)).pieces[0].tensor, seed=0)
        for routing in (HIDDEN_STATIC, HIDDEN_DYNAMIC)
    )
    assert static.std() == pytest.approx(0.1, rel=0.05) and abs(static.mean()) < 0.01
    assert dynamic.std() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("router", "decay"), [("static", 0.0), ("dynamic", 0.1)])
def test_routers_have_their_own_rate_and_only_dynamic_ones_are_decayed(router: str, decay: float) -> None:
    config = make_config(f"depth.router={router}")
    model = plain_model(config.model, config.pattern)
    group_of = {
        parameter: group for group in build_optimizer(model, config).param_groups for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        group = group_of[parameter]
        if "lime_router" in name:
            assert (group["peak_lr"], group["weight_decay"]) == (config.optim.router_lr, decay)
        else:
            assert group["peak_lr"] == config.optim.lr
            assert (group["weight_decay"] == 0.0) == ("norm" in name or "embed" in name)


# ---- plan


@pytest.mark.parametrize("pattern", ["full", "first:2", "last:2", "stride:2"])
def test_entries_cross_raw_under_every_policy(pattern: str) -> None:
    config = make_config(f"depth.pattern={pattern} parallel.pp=3 model.num_layers=6")
    least, relay = plan_transfer_of(config, "least"), plan_transfer_of(config, "relay")
    assert (least.raw_until, least.sum_from) == (relay.raw_until, relay.sum_from)
    assert not any(boundary.partial_sums for boundary in least.hops)
    of_keys = plan_transfer(
        make_config(f"depth.entry=kv depth.pattern={pattern} model.num_layers=6").pattern, config.chunks, policy="relay"
    )
    assert least.hops == of_keys.hops


@pytest.mark.parametrize(
    ("text", "rows", "width"),
    [
        ("", 14, 4),
        ("run.dtype=bf16", 14, 2),
        ("parallel.tp=2", 7, 4),
        ("parallel.tp=2 data.seq_length=3 data.global_batch_size=1", 2, 4),
    ],
)
def test_an_entry_is_a_hidden_state_of_this_ranks_tokens(text: str, rows: int, width: int) -> None:
    plans = plan_run(make_config(f"parallel.pp=2 pipeline.partition=[2,3] {text}")).chunks
    assert plans[0].shape.entry_bytes == plans[0].shape.residual_bytes == rows * 32 * width
    assert plans[0].sent_bytes == 3 * rows * 32 * width  # the residual and entries 0 and 1


# ---- checkpoints and patterns


def test_pruning_keeps_each_heads_largest_shares_and_their_sum_is_one() -> None:
    shares = numpy.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert numpy.allclose(pruned(shares, 0.8), [[0.625, 0.375, 0], [0, 0, 1]])
    assert numpy.allclose(pruned(shares, 1.0), shares)
    routing, router = StaticRouting(head_top_p=0.8), numpy.log(shares)
    assert numpy.allclose(routing.source_weights(router), pruned(shares, 0.8))


@pytest.mark.parametrize(
    ("routing", "shape", "cut_shape"),
    [(KEY_VALUE, (2, 4, 2), (2, 3, 2)), (HIDDEN_STATIC, (2, 4), (2, 3)), (HIDDEN_DYNAMIC, (8, 32), (6, 32))],
)
def test_a_router_loses_its_cut_sources(routing: Routing, shape: tuple[int, ...], cut_shape: tuple[int, ...]) -> None:
    whole = numpy.random.default_rng(0).normal(size=shape).astype(numpy.float32)
    by_head = whole.reshape(2, 4, -1)
    cut = routing.without_sources(whole, 4, [0, 2, 3])
    assert cut.shape == cut_shape
    assert (cut.reshape(2, 3, -1) == by_head[:, [0, 2, 3]]).all()


def test_edge_weights_are_mean_shares() -> None:
    router = numpy.log(numpy.array([[1.0, 3.0, 4.0], [2.0, 2.0, 4.0]]))
    weights = mean_magnitudes({2: HIDDEN_STATIC.source_weights(router)}, {2: (0, 1, 2)})
    assert weights == {(2, 0): pytest.approx(3 / 16), (2, 1): pytest.approx(5 / 16)}


# ---- what is refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth.entry=kv depth.router=dynamic", "depth.router: dynamic with depth.entry=kv"),
        ("depth.router=dynamic depth.pattern=top_p:0.9", "depth.pattern: top_p:0.9 with depth.router=dynamic"),
        ("depth.router=dynamic run.steps=9 depth.switch_at='{5: top_p:0.9}'", "depth.switch_at.5: top_p:0.9 with"),
        ("depth.entry=values", "depth.entry: 'values' is unknown; use kv or hidden"),
    ],
)
def test_what_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(text)


def test_without_routers_the_entry_does_not_matter() -> None:
    assert make_config("depth.router=none").pattern == make_config("depth.router=none depth.entry=kv").pattern
