"""Initial values, and logical tensors into and out of a stage's parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lime_dist.config import ModelConfig
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


def of_role(role: Role) -> list[Tensor]:
    return [initial_values(tensor, 0) for tensor in TENSORS.values() if tensor.role is role]


def test_norms_are_one_and_projections_normal() -> None:
    assert all(torch.equal(values, torch.ones(64)) for values in of_role(Role.NORM))
    for values in of_role(Role.PROJECTION) + of_role(Role.EMBEDDING):
        assert values.std() == pytest.approx(0.02, rel=0.05)  # 4096 draws at least: 1 % off at one deviation
        assert abs(values.mean()) < 0.002


def test_keys_and_values_are_uniform_within_one_over_root_hidden() -> None:
    for values in of_role(Role.KEY_VALUE):
        assert values.abs().max() <= 0.125
        assert values.std() == pytest.approx(0.125 / 3**0.5, rel=0.05)


def test_routers_begin_with_their_own_layer_and_a_random_rest() -> None:
    for reader, values in enumerate(of_role(Role.ROUTER), start=1):
        sources = reader + 1
        assert values.shape == (4, sources, 4)
        assert torch.equal(values[:, -1], torch.eye(4))
        bound, rest = (3 / (sources * 4)) ** 0.5, values[:, :-1]
        assert bound / 2 < rest.abs().max() <= bound and rest.min() < 0 < rest.max()


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
