"""The plain model equals the authors' code, with and without recompute and on any subset of what it can be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lime_dist.config import Config, check_config, parse_config
from lime_dist.lime.layers import RotaryTables, rope_tables, rotate
from lime_dist.lime.model import LimeChunk, model_logits, model_loss, plain_model
from lime_dist.lime.values import assemble_local, gather_logical, initialize, load, specified_parameters
from lime_dist.plan.tensors import Role
from lime_dist.training.optim import build_optimizer, set_lr

GOLDEN = sorted(path.parent for path in (Path(__file__).parent.parent / "golden").glob("*/config.json"))
TOLERANCE = 1e-5  # fp32 sums in another order; 1e-6 of a tensor's largest magnitude was seen
NORM_TOLERANCE = 1e-4  # over all updates, in which differences grow; 3e-5 was seen


def read_config(folder: Path) -> Config:
    facts = json.loads((folder / "config.json").read_text())
    optim = facts["optimizer"]
    tree = {
        "model": {
            "num_layers": facts["num_layers"],
            "hidden_size": facts["hidden_size"],
            "intermediate_size": facts["intermediate_size"],
            "num_heads": facts["num_attention_heads"],
            "num_kv_heads": facts["num_kv_heads"],
            "vocab_size": facts["vocab_size"],
            "tie_embeddings": facts["tie_word_embeddings"],
            "rope_theta": facts["rope_theta"],
            "rms_norm_eps": facts["rms_norm_eps"],
        },
        "depth": facts.get("depth", {}),
        "optim": {
            "warmup_steps": 0,
            "lr_schedule": "constant",
            **{key: optim[key] for key in ("lr", "router_lr", "betas", "eps", "weight_decay", "max_grad_norm")},
        },
    }
    return check_config(parse_config(tree))


def read_tensors(path: Path) -> dict[str, Tensor]:
    return {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}


def make_golden(folder: Path, recompute: bool) -> tuple[Config, LimeChunk]:
    config, weights = read_config(folder), read_tensors(folder / "weights.safetensors")
    model = plain_model(config.model, config.pattern, recompute=recompute)
    load(model, lambda tensor: weights[tensor.name])
    assert weights.keys() == gather_logical(model, lambda parameter: parameter).keys()
    return config, model


def test_the_golden_folders_are_of_every_kind() -> None:
    assert {folder.name for folder in GOLDEN} == {"mha4", "gqa4", "v1_static4", "v1_dynamic4", "llama4_gqa"}


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_logits_are_the_authors(folder: Path) -> None:
    _, model = make_golden(folder, recompute=False)
    io = load_file(folder / "io.safetensors")
    with torch.no_grad():
        logits = model_logits(model, io["tokens"][0][:, :-1])
    torch.testing.assert_close(logits, io["logits"], rtol=0, atol=TOLERANCE * float(io["logits"].abs().max()))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_losses_and_gradients_are_the_authors_over_all_steps(folder: Path, recompute: bool) -> None:
    config, model = make_golden(folder, recompute)
    io = load_file(folder / "io.safetensors")
    optimizer, losses, norms = build_optimizer(model, config), [], []
    for step, batch in enumerate(io["tokens"].long()):
        optimizer.zero_grad()
        loss = model_loss(model, batch)
        loss.backward()
        if step == 0:
            assert_gradients(model, read_tensors(folder / "grads.safetensors"))
        losses.append(float(loss))
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)))
        set_lr(optimizer, 1.0)
        optimizer.step()
    assert losses[0] == pytest.approx(float(io["loss"]), rel=TOLERANCE)
    assert losses == pytest.approx(io["loss_trace"].tolist(), rel=TOLERANCE)
    assert norms == pytest.approx(io["grad_norm_trace"].tolist(), rel=NORM_TOLERANCE)


def assert_gradients(model: LimeChunk, expected: dict[str, Tensor]) -> None:
    actual = gather_logical(model, lambda parameter: parameter.grad)
    assert actual.keys() == expected.keys()
    differences = {
        name: float((actual[name] - value).abs().max() / value.abs().max()) for name, value in expected.items()
    }
    assert {name: value for name, value in differences.items() if not value < TOLERANCE} == {}


# ---- what the golden folder's pattern and sizes do not reach


def make_model(overrides: str, recompute: bool = False) -> tuple[Config, LimeChunk]:
    tree = {"model": {"num_layers": 5, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "vocab_size": 50}}
    config = check_config(parse_config(tree, overrides.split()))
    model = plain_model(config.model, config.pattern, recompute=recompute)
    initialize(model, seed=0)
    return config, model


def make_tokens(rows: int = 3, length: int = 8) -> Tensor:
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(5))


MODELS = (
    "",
    "model.num_kv_heads=2 depth.pattern=first:1",
    "model.tie_embeddings=false depth.pattern=last:2",
    "depth.pattern=stride:2 model.num_kv_heads=1",
    "depth.router=none",
)


@pytest.mark.parametrize("overrides", MODELS)
def test_recompute_changes_no_gradient(overrides: str) -> None:
    found = []
    for recompute in (False, True):
        _, model = make_model(overrides, recompute)
        model_loss(model, make_tokens()).backward()
        found.append(gather_logical(model, lambda parameter: parameter.grad))
    assert {name for name in found[0] if not torch.equal(found[0][name], found[1][name])} == set()


@pytest.mark.parametrize("overrides", MODELS)
def test_what_a_token_predicts_depends_on_no_later_one(overrides: str) -> None:
    _, model = make_model(overrides)
    tokens = make_tokens()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    with torch.no_grad():
        before, after = model_logits(model, tokens), model_logits(model, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:], rtol=1e-3)


@pytest.mark.parametrize("overrides", [overrides for overrides in MODELS if "none" not in overrides])
def test_routers_that_are_the_identity_make_a_llama(overrides: str) -> None:
    _, lime = make_model(overrides)
    _, llama = make_model(f"{overrides} depth.router=none")
    weights = gather_logical(llama, lambda parameter: parameter)
    with torch.no_grad():
        for spec, parameter in specified_parameters(lime):
            if spec.role is Role.ROUTER:
                parameter[:, :-1] = 0
            else:
                parameter.copy_(assemble_local(spec, lambda tensor: weights[tensor.name]))
        torch.testing.assert_close(model_logits(lime, make_tokens()), model_logits(llama, make_tokens()))


@pytest.mark.parametrize("ablation", ["depth.heads=same", "depth.router=average"])
@pytest.mark.parametrize("overrides", MODELS[:4])
def test_heads_that_read_themselves_are_diagonal_routers(overrides: str, ablation: str) -> None:
    """Of every source, or the mean: the logits of the whole router [heads, sources, heads] that says the same."""
    _, ablated = make_model(f"{overrides} {ablation}")
    config, whole = make_model(overrides)
    weights = gather_logical(ablated, lambda parameter: parameter.detach())
    with torch.no_grad():
        for spec, parameter in specified_parameters(whole):
            name, heads = spec.pieces[0].tensor.name, config.model.kv_heads
            if spec.role is not Role.ROUTER:
                parameter.copy_(assemble_local(spec, lambda tensor: weights[tensor.name]))
                continue
            shares = weights.get(name, torch.full(parameter.shape[:2], 1 / parameter.shape[1]))
            parameter.copy_(shares[..., None] * torch.eye(heads)[:, None])
        torch.testing.assert_close(model_logits(ablated, make_tokens()), model_logits(whole, make_tokens()))
    assert any("lime_router" in name for name in weights) is ("average" not in ablation)


def test_a_router_weight_moves_one_source_head_to_one_reader_head() -> None:
    """R[h, i, h'] adds entry i's head h' to head h of what the reader attends to: seen in the memory itself."""
    _, model = make_model("model.num_kv_heads=2")
    tokens = make_tokens()
    memory = model.new_memory(tokens.numel())
    with torch.no_grad():
        model(tokens, *tokens.shape, memory)
        weight = torch.zeros(2, 4, 2)
        weight[1, 2, 0] = 3.0
        routed = memory.read(3, weight, (0, 1, 2, 3), memory.start())
    assert torch.equal(routed[1], 3 * memory.entries.values[2, 0])
    assert not routed[0].any()


def test_rope_turns_by_position_alone() -> None:
    """The product of a rotated query and key depends on their distance (RoFormer, eq. 11)."""
    cos, sin = rope_tables(0, 10, 8, 10000.0, torch.device("cpu"))
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    turned = rotate(query.expand(10, 8), cos, sin) @ rotate(key.expand(10, 8), cos, sin).T
    for distance in range(1, 9):
        diagonal = turned.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert float(turned.diagonal(-1)[0]) != pytest.approx(float(turned.diagonal(1)[0]))
    later_cos, later_sin = rope_tables(4, 6, 8, 10000.0, torch.device("cpu"))
    assert torch.equal(later_cos, cos[4:]) and torch.equal(later_sin, sin[4:])


def test_rotary_tables_are_made_once_for_the_same_positions() -> None:
    tables = RotaryTables(8, 10000.0, torch.bfloat16, torch.device("cpu"))
    first = tables.at(range(4, 10))
    for made, expected in zip(first, rope_tables(4, 6, 8, 10000.0, torch.device("cpu"))):
        assert made.dtype is torch.bfloat16 and torch.equal(made, expected.bfloat16())
    assert tables.at(range(4, 10)) is first and tables.at(range(5, 11)) is not first


def test_what_is_kept_in_inference_mode_serves_a_backward_pass() -> None:
    sizes = {"num_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96}
    config = check_config(parse_config({"model": sizes}))
    model = plain_model(config.model, config.pattern)
    initialize(model, 0)
    tokens = torch.arange(14).view(2, 7)
    with torch.inference_mode():
        inferred = float(model_loss(model, tokens))
    loss = model_loss(model, tokens)
    loss.backward()
    assert float(loss) == inferred and all(parameter.grad is not None for parameter in model.parameters())
    assert not list(model.buffers())
