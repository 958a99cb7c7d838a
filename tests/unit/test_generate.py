"""Decoding with a cache equals decoding without one, with a cache of LLaMA's size; sampling."""

from __future__ import annotations

import pytest
import torch

from lime_dist.config import check_config, parse_config
from lime_dist.errors import ConfigError
from lime_dist.generate import Sampling, generate_ids, sample
from lime_dist.lime.layers import KeyValueCache
from lime_dist.lime.model import LimeChunk, model_logits, plain_model
from lime_dist.lime.values import specified_parameters

MODELS = {
    "mha": [],
    "gqa": ["model.num_kv_heads=2"],
    "gqa-untied-first": ["model.num_kv_heads=2", "model.tie_embeddings=false", "depth.pattern=first:1"],
    "llama": ["model.num_kv_heads=2", "depth.router=none"],
}
GREEDY = Sampling(temperature=0)
PROMPT = [5, 17, 3, 80]
# Probabilities of tokens 0 to 4.
LOGITS = torch.tensor([0.15, 0.5, 0.05, 0.27, 0.03]).log()
# Passes of different lengths sum in different orders (fp32).
TOLERANCE = 1e-5


def make_model(overrides: list[str]) -> LimeChunk:
    """Large random weights, so that continuations vary and every router matters."""
    tree = {"model": dict(num_layers=4, hidden_size=32, intermediate_size=48, num_heads=4, vocab_size=96)}
    config = check_config(parse_config(tree, overrides))
    model = plain_model(config.model, config.pattern).eval()
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for _, parameter in specified_parameters(model):
            parameter.normal_(0, 0.4, generator=generator)
    return model


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> LimeChunk:
    return make_model(MODELS[request.param])


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(model: LimeChunk) -> None:
    ids = list(PROMPT)
    for token in generate_ids(model, PROMPT, GREEDY, max_new_tokens=24):
        assert token == int(model_logits(model, torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)
    assert len(ids) == len(PROMPT) + 24 and len(set(ids)) > 8, "a constant continuation would show little"


@torch.no_grad()
@pytest.mark.parametrize("passes", [(1,) * 8, (3, 1, 4), (7, 1), (2, 6)], ids=str)
def test_logits_through_the_cache(model: LimeChunk, passes: tuple[int, ...]) -> None:
    tokens = torch.randint(96, (2, 8), generator=torch.Generator().manual_seed(3))
    whole, cache, pieces = model_logits(model, tokens), KeyValueCache(), []
    for part in tokens.split(passes, dim=1):
        residual, _ = model(part, *part.shape, model.new_memory(part.numel()), cache=cache)
        pieces.append(model.whole_logits(residual).unflatten(0, tuple(part.shape)))
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < TOLERANCE * whole.abs().max()


@torch.no_grad()
def test_the_cache_is_llamas_size(model: LimeChunk) -> None:
    cache = KeyValueCache()
    for part in torch.randint(96, (2, 8)).split((5, 1, 2), dim=1):
        model(part, *part.shape, model.new_memory(part.numel()), cache=cache)
    sizes = model.config
    assert cache.length == 8
    elements = sum(tensor.numel() for pair in cache.kv.values() for tensor in pair)
    assert elements == 2 * sizes.num_layers * sizes.kv_heads * sizes.head_dim * 2 * 8  # K and V; 2 x 8 tokens
    # Nor does a view keep something larger alive.
    storages = {tensor.untyped_storage() for pair in cache.kv.values() for tensor in pair}
    assert sum(storage.nbytes() for storage in storages) == 4 * elements


def draw(sampling: Sampling, logits: torch.Tensor = LOGITS, count: int = 400) -> set[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return {sample(logits, sampling, generator) for _ in range(count)}


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(), {0, 1, 2, 3, 4}),
        (GREEDY, {1}),
        (Sampling(top_k=1), {1}),
        (Sampling(top_k=2), {1, 3}),
        (Sampling(top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(top_p=0.4), {1}),
        (Sampling(top_p=0.6), {1, 3}),  # the token that reaches top_p is in
        (Sampling(top_p=0.8), {0, 1, 3}),
        (Sampling(top_k=3, top_p=0.6), {1, 3}),
        (Sampling(top_k=1, top_p=0.99), {1}),
        (Sampling(temperature=0.05), {1}),  # 0.5 to 0.27, to the 20th power
        (Sampling(top_p=0.9), {0, 1, 3}),
        (Sampling(temperature=2.0, top_p=0.9), {0, 1, 2, 3}),  # 0.35, 0.26, 0.19, 0.11, 0.09
        (Sampling(temperature=0.5, top_p=0.9), {1, 3}),  # 0.72, 0.21, ...
    ],
    ids=str,
)
def test_support(sampling: Sampling, support: set[int]) -> None:
    assert draw(sampling) == support


def test_frequencies_are_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(LOGITS, Sampling(top_k=2), generator) for _ in range(4000)]
    # 0.5 / 0.77; four standard deviations of 4,000 draws are 0.03.
    assert drawn.count(1) / 4000 == pytest.approx(0.649, abs=0.03)


def test_seeds() -> None:
    model = make_model([])

    def tokens(seed: int) -> list[int]:
        return list(generate_ids(model, PROMPT, Sampling(seed=seed, temperature=1.5), 12))

    assert tokens(3) == tokens(3)
    assert len({tuple(tokens(seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_values_that_cannot_be(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: must be "):
        Sampling(**wrong)
