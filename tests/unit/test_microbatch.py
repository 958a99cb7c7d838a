"""What counts in the loss and what sees what, against examples run one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lime_dist.config import check_config, parse_config
from lime_dist.data.marks import BEGINS, NOT_TARGET
from lime_dist.lime.microbatch import count_targets, read_microbatch
from lime_dist.lime.model import LimeChunk, model_logits, model_loss, plain_model
from lime_dist.lime.values import gather_logical, initialize

EXAMPLES = [  # token ids, how many of the first are not part of the loss
    ([5, 3, 8, 2], 2),
    ([1, 7, 7, 4, 9, 2], 3),
    ([6, 2], 1),
    ([9, 9, 1, 2], 2),
]


def make_model(overrides: str) -> LimeChunk:
    sizes = {"num_layers": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "vocab_size": 12}
    config = check_config(parse_config({"model": sizes}, overrides.split()))
    model = plain_model(config.model, config.pattern)
    initialize(model, seed=1)
    return model


def sample(examples: list[int], length: int) -> list[int]:
    """Whole documents and padding, as marked values."""
    values: list[int] = []
    for index in examples:
        ids, prompt = EXAMPLES[index]
        marks = [NOT_TARGET if place < prompt else 0 for place in range(len(ids))]
        marks[0] |= BEGINS
        values += [token | mark for token, mark in zip(ids, marks)]
    padding = [2 | NOT_TARGET] * (length - len(values))
    if padding:
        padding[0] |= BEGINS
    return values + padding


def one_by_one(model: LimeChunk) -> Tensor:
    """The mean loss of all targets that count, each example alone."""
    losses = []
    for ids, prompt in EXAMPLES:
        logits = model_logits(model, torch.tensor([ids[:-1]]))[0]
        losses.append(F.cross_entropy(logits[prompt - 1 :], torch.tensor(ids[prompt:]), reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("overrides", ["", "depth.entry=hidden", "depth.router=none model.num_kv_heads=2"])
@pytest.mark.parametrize("packing", [[[0], [1], [2], [3]], [[0, 2], [1, 3]], [[1], [0, 2, 3]]])
def test_padded_and_packed_examples_give_the_loss_of_examples_one_by_one(
    packing: list[list[int]], overrides: str
) -> None:
    model = make_model(overrides)
    model_loss(model, torch.tensor([sample(examples, 11) for examples in packing])).backward()
    packed = {name: value.clone() for name, value in gather_logical(model, lambda parameter: parameter.grad).items()}
    model.zero_grad()
    expected = one_by_one(model)
    expected.backward()
    values = torch.tensor([sample(examples, 11) for examples in packing])
    assert float(model_loss(model, values)) == pytest.approx(float(expected), rel=1e-5)
    for name, value in gather_logical(model, lambda parameter: parameter.grad).items():
        assert (packed[name] - value).abs().max() < 1e-5 * value.abs().max(), name


def test_targets_that_count() -> None:
    values = torch.tensor([sample([0, 2], 8), sample([1], 8)])
    assert count_targets(values) == 2 + 1 + 3
    assert float(read_microbatch(values, 4.0).examples.weights.sum()) == 6 / 4


def test_a_target_weighs_the_same_where_microbatches_have_less_than_one_each() -> None:
    values = torch.full((2, 5), 3 | NOT_TARGET)
    values[0, 2] = 3
    assert float(read_microbatch(values, 0.25).examples.weights.sum()) == 4.0
    assert float(read_microbatch(values | NOT_TARGET, 0.0).examples.weights.sum()) == 0.0


def test_values_without_marks_are_token_ids() -> None:
    values = torch.arange(14).view(2, 7)
    microbatch = read_microbatch(values)
    assert microbatch.examples is None and microbatch.tokens is values
    assert read_microbatch(values, 12.0).examples is None
    # The same tokens in a batch in which others do not count.
    assert float(read_microbatch(values, 10.0).examples.weights.sum()) == pytest.approx(1.2)


def test_a_batch_without_targets_has_no_loss() -> None:
    values = torch.full((2, 5), 3 | NOT_TARGET)
    assert float(model_loss(make_model(""), values)) == 0.0
