"""Every element of every logical tensor has its owners: one over the tensor group if it is cut, one stage in any case."""

from __future__ import annotations

from math import prod

import pytest
import torch

from lime_dist.config import ModelConfig
from lime_dist.depth.pattern import none_pattern, parse_pattern
from lime_dist.lime.model import plain_model
from lime_dist.plan.parameters import (
    count_parameters,
    logical_tensors,
    padded_vocab_size,
    plan_parameters,
)
from lime_dist.plan.partition import plan_partition
from lime_dist.plan.tensors import ParameterSpec, Role
from lime_dist.plan.transfer import plan_transfer


def make_model(**changes: int | bool) -> ModelConfig:
    sizes = {"num_layers": 5, "hidden_size": 32, "intermediate_size": 24, "num_heads": 4, "vocab_size": 300}
    return ModelConfig(**{**sizes, **changes})


CASES = [  # tp, layers of each stage, pattern, policy, model
    (1, [5], "full", "relay", {}),
    (4, [5], "full", "relay", {"tie_embeddings": False}),  # 128, 128, 44 and 0 rows of the vocabulary
    (2, [1, 4], "full", "least", {"num_kv_heads": 2}),
    (2, [3, 1, 1], "full", "least", {}),
    (1, [1, 3, 1], "first:2", "least", {"tie_embeddings": False}),
    (2, [1, 1, 1, 2], "stride:2", "relay", {"num_kv_heads": 2}),
    (4, [2, 1, 2], "stride:3", "least", {}),
    (2, [2, 3], "none", "least", {"vocab_size": 64}),
]


@pytest.mark.parametrize(("tp", "counts", "text", "policy", "changes"), CASES)
def test_every_element_is_covered_once(
    tp: int, counts: list[int], text: str, policy: str, changes: dict[str, int | bool]
) -> None:
    model = make_model(**changes)
    pattern = none_pattern(5) if text == "none" else parse_pattern(text, 5)
    stages = plan_partition(5, len(counts), counts)
    transfer = plan_transfer(pattern, stages, policy=policy)
    tensors = logical_tensors(model, pattern)
    holders = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    counted, unowned = 0, 0
    for index, layers in enumerate(stages):
        for tp_rank in range(tp):
            specs = plan_parameters(
                model,
                transfer.chunk(index),
                layers,
                tp=tp,
                tp_rank=tp_rank,
                vocab_rows=padded_vocab_size(model.vocab_size, tp),
            )
            counted += count_parameters(specs)
            for spec in specs:
                unowned += prod(spec.shape) if spec.tied_copy else padding_of(spec)
                for piece in spec.pieces if not spec.tied_copy else ():
                    assert piece.tensor == tensors[piece.tensor.name]
                    share = 1.0 if spec.sharded else 1 / tp
                    holders[piece.tensor.name].narrow(piece.dim, piece.start, piece.length).add_(share)
    assert {name for name, held in holders.items() if not torch.equal(held, torch.ones_like(held))} == set()
    replicated = sum(holders[name].numel() for name, t in tensors.items() if t.role in (Role.NORM, Role.ROUTER))
    assert counted == sum(held.numel() for held in holders.values()) + (tp - 1) * replicated + unowned


def padding_of(spec: ParameterSpec) -> int:
    """Pieces lie in the parameter beside each other, and leave only the vocabulary's padding free."""
    local = torch.zeros(spec.shape)
    for piece in spec.pieces:
        local.narrow(piece.dim, piece.local_start, piece.length).add_(1)
    padding = int((local == 0).sum())
    assert local.max() <= 1
    assert padding == 0 or spec.name in ("embed_tokens.weight", "lm_head.weight")
    return padding


def test_a_tied_embedding_has_a_copy_on_the_last_stage_alone() -> None:
    def copies(tied: bool, counts: list[int]) -> list[list[str]]:
        stages = plan_partition(5, len(counts), counts)
        plan = plan_transfer(parse_pattern("full", 5), stages, policy="least")
        return [
            [spec.name for spec in plan_parameters(make_model(tie_embeddings=tied), plan.chunk(i), layers, tp=1, tp_rank=0, vocab_rows=384) if spec.tied_copy]
            for i, layers in enumerate(stages)
        ]  # fmt: skip

    assert copies(True, [2, 1, 2]) == [[], [], ["lm_head.weight"]]
    assert copies(True, [5]) == [[]]
    assert copies(False, [2, 3]) == [[], []]


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 2, "tie_embeddings": False}])
def test_names_and_shapes_are_those_of_the_module(changes: dict[str, int | bool]) -> None:
    model = plain_model(make_model(**changes), parse_pattern("full", 5))
    specs = {spec.name: spec.shape for spec in model.parameter_specs()}
    assert specs == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("num_layers", "kv_heads", "parameters"), [(16, 8, 8640), (16, 32, 138_240)])
def test_routers_are_of_the_papers_size(num_layers: int, kv_heads: int, parameters: int) -> None:
    model = make_model(num_layers=num_layers, num_heads=32, num_kv_heads=kv_heads, hidden_size=2048)
    tensors = logical_tensors(model, parse_pattern("full", num_layers)).values()
    routers = [tensor.shape for tensor in tensors if tensor.role is Role.ROUTER]
    assert sum(heads * layers * sources for heads, layers, sources in routers) == parameters


def test_roles() -> None:
    tensors = logical_tensors(make_model(tie_embeddings=False), parse_pattern("full", 5))
    roles = {
        "embed_tokens": Role.EMBEDDING, "lm_head": Role.PROJECTION, "norm": Role.NORM, "input_layernorm": Role.NORM,
        "post_attention_layernorm": Role.NORM, "q_proj": Role.PROJECTION, "k_proj": Role.PROJECTION,
        "v_proj": Role.PROJECTION, "o_proj": Role.PROJECTION, "gate_proj": Role.PROJECTION, "up_proj": Role.PROJECTION,
        "down_proj": Role.PROJECTION, "lime_router": Role.ROUTER,
    }  # fmt: skip
    assert {name: tensor.role for name, tensor in tensors.items()} == {
        name: roles[name.split(".")[-2]] for name in tensors
    }
    assert len(tensors) == 3 + 5 * 9 + 4


@pytest.mark.parametrize(
    ("vocab_size", "tp", "padded"), [(1, 1, 128), (128, 1, 128), (129, 1, 256), (128, 4, 512), (50257, 2, 50432)]
)
def test_vocabulary_is_padded_as_megatron_pads_it(vocab_size: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab_size, tp) == padded
