"""A loss over some targets only, and documents that do not see each other: the same under every layout."""

from __future__ import annotations

import common
import pytest
import torch
from common import assert_equals_the_single_process, make_config, make_plain
from torch import Tensor

from lime_dist.config import Config
from lime_dist.data.marks import BEGINS, NOT_TARGET
from lime_dist.lime.model import model_loss
from lime_dist.testing import run_ranks
from lime_dist.training.rank import Rank


def marked_batches(config: Config, count: int = len(common.LR_FACTORS)) -> list[Tensor]:
    """Rows with few targets, with many and with none, and documents that begin anywhere."""
    generator = torch.Generator().manual_seed(9)
    batches = make_batches(config, count)
    for batch in batches:
        rates = torch.rand(len(batch), 1, generator=generator)
        rates[0], rates[1] = 0.0, 1.0
        batch |= (torch.rand(batch.shape, generator=generator) > rates) * NOT_TARGET
        batch |= (torch.rand(batch.shape, generator=generator) < 0.3) * BEGINS
    return batches


make_batches = common.make_batches


@pytest.fixture(autouse=True)
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "make_batches", marked_batches)


@pytest.mark.parametrize(
    "text",
    [
        "tp=2 sp seq=5 batch=3",  # a row of padding on the second tensor rank
        "pp=3 layers=6 micro=3 dp=2",
        "pp=4 micro=4 relay recompute",
        "pp=2 v=2 micro=4 kv=2",
        "dp=2 zero=3 micro=2",
        "pp=3 tp=2 split=[1,1,2] hidden micro=2",
        "pp=3 llama micro=6",
    ],
)
def test_layout_equals_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_config(text))


def one_target(config: Config, count: int = len(common.LR_FACTORS)) -> list[Tensor]:
    """A batch of one target is less than one for each microbatch of each replica."""
    batches = [batch | NOT_TARGET for batch in make_batches(config, count)]
    for batch in batches:
        batch[3, 2] &= ~NOT_TARGET
    return batches


def test_fewer_targets_than_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "make_batches", one_target)
    assert_equals_the_single_process(make_config("pp=2 dp=2 micro=3"))


def evaluate(rank: Rank, batches: list[Tensor]) -> float | None:
    return rank.evaluate(batches)


def test_every_target_of_an_evaluation_counts_the_same() -> None:
    config = make_config("pp=2 micro=2")
    batches = [
        *marked_batches(config, 2),
        *one_target(config, 1),
        *(batch | NOT_TARGET for batch in make_batches(config, 1)),
    ]
    expected = float(model_loss(make_plain(config), torch.cat(batches)))
    assert run_ranks(config, evaluate, batches) == [pytest.approx(expected, rel=1e-5)] * 2
