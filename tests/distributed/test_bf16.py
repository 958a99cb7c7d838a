"""bf16 stays as near to the fp32 single process as its eight bits allow, and sums microbatches in fp32."""

from __future__ import annotations

import pytest
import torch
from common import make_batches, make_config, run_layout, run_plain, weight_of
from torch import Tensor

from lime_dist.testing import Pieces, assemble, local_pieces, run_ranks
from lime_dist.training.rank import Rank

# A rounding to bf16 errs by up to 2**-9 (0.2 %). Six layers are some 60 roundings one after the other, forward and
# backward; independent ones add up to sqrt(2 * 60) * 2**-9, 2 % of a tensor's norm, and 2.4 % were seen. A microbatch,
# a tensor rank or a stage left out is ten times that.
TENSOR_TOLERANCE = 0.05
# The loss is a mean over 72 tokens of logits small at the start: errors average out. 1e-4 was seen.
LOSS_TOLERANCE = 1e-3

LAYOUTS = (
    "pp=3 tp=2 layers=6 micro=4",
    "pp=3 tp=2 layers=6 micro=4 zero=0 sp",
    "pp=3 layers=6 micro=4 zero=0 untied relay",
    "pp=3 layers=6 split=[3,2,1] micro=2 sums32 recompute",
    "dp=2 layers=6 micro=3 zero=2",
    "dp=2 layers=6 micro=3 zero=3",
)


@pytest.mark.parametrize("text", LAYOUTS)
def test_bf16_is_near_the_fp32_single_process(text: str) -> None:
    expected = run_plain(make_config(text))
    actual, _ = run_layout(make_config(f"{text} bf16"))
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=TENSOR_TOLERANCE)
    assert far_off(actual.gradients, expected.gradients) == {}
    assert far_off(actual.weights, expected.weights) == {}


def far_off(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    distances = {name: float((actual[name] - value).norm() / value.norm()) for name, value in expected.items()}
    return {name: distance for name, distance in distances.items() if not distance < TENSOR_TOLERANCE}


@pytest.mark.parametrize("text", ["pp=2 zero=1", "pp=2 tp=2 zero=0", "zero=2", "zero=3"])
def test_equal_microbatches_sum_to_one_of_them_bit_for_bit(text: str) -> None:
    """16 equal microbatches of weight 1/16: their sum is exact in fp32, and not when each addition rounds to bf16."""
    row = make_batches(make_config())[0][:1]
    one, many = (
        assemble(run_ranks(make_config(f"{text} bf16 batch={count} micro={count}"), gradients, row.repeat(count, 1)))
        for count in (1, 16)
    )
    assert {name for name in one if not torch.equal(one[name], many[name])} == set()


def gradients(rank: Rank, batch: Tensor) -> Pieces:
    rank.accumulate(batch)
    return local_pieces(rank, rank.optimizer.gradient)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_updates_below_bf16s_resolution_add_up(zero_stage: int) -> None:
    """Ten updates of 1e-3 each: the numbers next to 1 in bf16 are 0.996 and 1.008, so only an fp32 copy gathers them."""
    config = make_config(f"zero={zero_stage} bf16 lr=1e-3 eps=1e-12")
    (scales,) = run_ranks(config, final_norm_after_ten_steps, make_batches(config)[0])
    assert (scales != 1).float().mean() > 0.8


def final_norm_after_ten_steps(rank: Rank, batch: Tensor) -> Tensor:
    for _ in range(10):
        rank.train_step(batch, 1.0)
    return assemble([local_pieces(rank, weight_of(rank))])["norm.weight"]
