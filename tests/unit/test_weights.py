"""Initial values, and logical tensors into and out of a stage's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from lime_dist.config import ModelConfig, check_config, parse_config
from lime_dist.depth.key_value import ROUTER_INITS, KeyValueRouting
from lime_dist.depth.pattern import parse_pattern
from lime_dist.lime.model import plain_model
from lime_dist.lime.values import assemble_local, gather_logical, initial_values, initialize, load, slices
from lime_dist.plan.parameters import logical_tensors, plan_parameters
from lime_dist.plan.partition import plan_partition
from lime_dist.plan.tensors import LogicalTensor, Role
from lime_dist.plan.transfer import plan_transfer

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=200,
    tie_embeddings=False,
)
PATTERN = parse_pattern("full", 4)
TENSORS = logical_tensors(MODEL, PATTERN)


KINDS = {  # depth keys, whether K and V of the first layer, and of the others, are uniform: up to which bound
    "router=static entry=kv": (1 / 8, 1 / 8),
    "router=static entry=hidden": (None, 1 / 64),
    "router=dynamic entry=hidden": (None, 1 / 64),
    "router=none": (None, None),
}


def initial_of(depth: str) -> dict[str, Tensor]:
    """Of a multi-head model of 4 layers and hidden size 64."""
    words = dict(word.split("=") for word in depth.split())
    config = check_config(parse_config({"model": {**asdict(MODEL), "num_kv_heads": 8}, "depth": words}))
    tensors = logical_tensors(config.model, config.pattern)
    return {name: initial_values(tensor, 0) for name, tensor in tensors.items()}


@pytest.mark.parametrize("depth", KINDS)
def test_norms_are_one_and_matrices_normal(depth: str) -> None:
    for name, values in initial_of(depth).items():
        if "norm" in name:
            assert torch.equal(values, torch.ones(64)), name
        elif not any(part in name for part in ("k_proj", "v_proj", "lime_router")):
            assert_normal(values, 0.02)


@pytest.mark.parametrize("depth", KINDS)
def test_keys_and_values_begin_as_the_authors(depth: str) -> None:
    """v2: uniform(+-1 / root of hidden) on every layer; a reader of v1: uniform(+-1 / hidden); LLaMA's and v1's first: normal."""
    first, others = KINDS[depth]
    for name, values in initial_of(depth).items():
        if "k_proj" not in name and "v_proj" not in name:
            continue
        bound = first if name.startswith("layers.0.") else others
        if bound is None:
            assert_normal(values, 0.02)
        else:
            assert_uniform(values, bound)


def assert_normal(values: Tensor, std: float) -> None:
    """Spread, centre and tails; 4096 draws at least: 1 % off at one deviation."""
    assert values.std() == pytest.approx(std, rel=0.05)
    assert abs(values.mean()) < 0.1 * std
    assert 3 * std < values.abs().max()
    assert (values.abs() < std).float().mean() == pytest.approx(0.683, abs=0.03)


def assert_uniform(values: Tensor, bound: float) -> None:
    assert 0.99 * bound < values.abs().max() <= bound
    assert values.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert (values.abs() < bound / 2).float().mean() == pytest.approx(0.5, abs=0.03)


def routers_of(tensors: Iterable[LogicalTensor]) -> list[Tensor]:
    return [initial_values(tensor, 0) for tensor in tensors if tensor.role is Role.ROUTER]


def test_routers_begin_with_their_own_layer_and_a_random_rest() -> None:
    for reader, values in enumerate(routers_of(TENSORS.values()), start=1):
        sources = reader + 1
        assert values.shape == (4, sources, 4)
        assert torch.equal(values[:, -1], torch.eye(4))
        bound, rest = (3 / (sources * 4)) ** 0.5, values[:, :-1]
        assert bound / 2 < rest.abs().max() <= bound and rest.min() < 0 < rest.max()


@pytest.mark.parametrize(("heads", "inputs"), [("all", 16), ("same", 4)])
def test_ablations_of_the_routers_beginning(heads: str, inputs: int) -> None:
    found = {}
    for router_init in ROUTER_INITS:
        routing = KeyValueRouting(router_init=router_init, heads=heads)
        found[router_init] = routers_of(logical_tensors(MODEL, replace(PATTERN, routing=routing)).values())[-1]
    own = torch.eye(4) if heads == "all" else torch.ones(4)
    assert all(torch.equal(found[kind][:, -1], own) for kind in ("identity_uniform", "identity_zero"))
    assert not found["identity_zero"][:, :-1].any()
    assert 0.7 * (3 / inputs) ** 0.5 < found["uniform"].abs().max() <= (3 / inputs) ** 0.5
    assert not torch.equal(found["uniform"][:, -1], own)
    assert found["uniform"].shape == ((4, 4, 4) if heads == "all" else (4, 4))


def test_values_follow_from_seed_and_name_alone() -> None:
    tensor = TENSORS["layers.1.mlp.up_proj.weight"]
    other = LogicalTensor("layers.2.mlp.up_proj.weight", tensor.shape, tensor.role)
    torch.manual_seed(9)
    first = initial_values(tensor, 0)
    torch.rand(3)
    assert torch.equal(initial_values(tensor, 0), first)
    assert not torch.equal(initial_values(tensor, 1), first)
    assert not torch.equal(initial_values(other, 0), first)


def test_what_is_loaded_is_what_is_gathered() -> None:
    model = plain_model(MODEL, PATTERN)
    initialize(model, seed=4)
    initial = gather_logical(model, lambda parameter: parameter)
    assert all(torch.equal(value, initial_values(TENSORS[name], 4)) for name, value in initial.items())
    values = {name: torch.randn(tensor.shape) for name, tensor in TENSORS.items()}
    load(model, lambda tensor: values[tensor.name])
    gathered = gather_logical(model, lambda parameter: parameter)
    assert gathered.keys() == values.keys()
    assert all(torch.equal(gathered[name], value) for name, value in values.items())


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("counts", [[4], [1, 2, 1], [3, 1]])
def test_slices_of_all_ranks_put_the_tensors_together(tp: int, counts: list[int]) -> None:
    values = {name: torch.randn(tensor.shape) for name, tensor in TENSORS.items()}
    found = {name: torch.full(tensor.shape, float("nan")) for name, tensor in TENSORS.items()}
    stages = plan_partition(4, len(counts), counts)
    transfer = plan_transfer(PATTERN, stages, policy="least")
    for index, layers in enumerate(stages):
        for tp_rank in range(tp):
            specs = plan_parameters(MODEL, transfer.chunk(index), layers, tp=tp, tp_rank=tp_rank, vocab_rows=256 * tp)
            for spec in specs:
                local = assemble_local(spec, lambda tensor: values[tensor.name])
                for piece, part in slices(spec, local):
                    found[piece.tensor.name].narrow(piece.dim, piece.start, piece.length).copy_(part)
    assert all(torch.equal(found[name], value) for name, value in values.items())
