"""Log-likelihoods of many windows at once equal those of one after the other, worked out plainly from the logits."""

from __future__ import annotations

import pytest
import torch

import lime_dist.generate
from lime_dist.config import check_config, parse_config
from lime_dist.generate import generate_greedily
from lime_dist.harness import scoring
from lime_dist.harness.scoring import Score, Window, score_windows, window
from lime_dist.lime.model import LimeChunk, model_logits, plain_model
from lime_dist.lime.values import specified_parameters

MODELS = {
    "kv": ["model.num_kv_heads=2"],
    "dynamic": ["depth.entry=hidden", "depth.router=dynamic"],
    "llama": ["depth.router=none"],
}
# Passes of different sizes sum in different orders (fp32).
TOLERANCE = 1e-5
VOCABULARY = 40


def make_model(overrides: list[str]) -> LimeChunk:
    """Large random weights, so that every router and every place matters."""
    tree = {"model": dict(num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, vocab_size=VOCABULARY)}
    config = check_config(parse_config(tree, overrides))
    model = plain_model(config.model, config.pattern).eval()
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for _, parameter in specified_parameters(model):
            parameter.normal_(0, 0.4, generator=generator)
    return model


@torch.no_grad()
def plain_score(model: LimeChunk, one: Window) -> Score:
    logits = model_logits(model, torch.tensor([one.inputs]))[0, -len(one.targets) :]
    targets = torch.tensor(one.targets)
    log_likelihood = logits.log_softmax(-1)[torch.arange(len(targets)), targets].sum()
    return Score(log_likelihood=float(log_likelihood), is_greedy=bool((logits.argmax(-1) == targets).all()))


def some_windows(model: LimeChunk) -> list[Window]:
    """Of many lengths, with answers of one and of several tokens after equal contexts, and with what the model itself says."""
    generator = torch.Generator().manual_seed(3)

    def ids(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    windows = [window(ids(1 + 7 * index % 61), ids(1 + index % 5), 64) for index in range(20)]
    context = ids(9)
    windows += [window(context, [token], 64) for token in range(VOCABULARY)]
    (own,) = generate_greedily(model, [context], eos=-1, max_new_tokens=4)
    other = [*own[:-1], (own[-1] + 1) % VOCABULARY]
    return [*windows, window(context, own, 64), window(context, other, 64), window(context, own[:1], 64)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [2**15, 400, 1])
def test_batches_equal_one_by_one(name: str, batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where logits come in parts, and where each batch is one window."""
    monkeypatch.setattr(lime_dist.generate, "_BATCH_TOKENS", batch_tokens)
    monkeypatch.setattr(scoring, "_ROWS_AT_ONCE", 7)
    model = make_model(MODELS[name])
    windows = some_windows(model)
    found, expected = score_windows(model, windows), [plain_score(model, one) for one in windows]
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
    assert [one.log_likelihood for one in found] == pytest.approx(
        [one.log_likelihood for one in expected], rel=TOLERANCE
    )
    assert [one.is_greedy for one in found[-3:]] == [True, False, True]
    assert sum(one.is_greedy for one in found[20:60]) == 1


def test_equal_inputs_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make_model(MODELS["llama"]), []
    forward = LimeChunk.forward

    def counted(self: LimeChunk, inputs: torch.Tensor, *more: object) -> object:
        seen.append(tuple(inputs.shape))
        return forward(self, inputs, *more)

    monkeypatch.setattr(LimeChunk, "forward", counted)
    score_windows(model, [window([1, 2, 3], [token], 8) for token in range(30)])
    assert seen == [(1, 3)]


def test_windows_are_cut_on_the_left() -> None:
    assert window([1, 2, 3], [4, 5], 8) == Window(inputs=(1, 2, 3, 4), targets=(4, 5))
    assert window([1, 2, 3], [4, 5], 2) == Window(inputs=(3, 4), targets=(4, 5))
    assert window([1], [4, 5], 2) == Window(inputs=(1, 4), targets=(4, 5))


def test_nothing_to_score() -> None:
    assert score_windows(make_model(MODELS["llama"]), []) == []
