"""Matrix-based Renyi entropy and effective rank: spectra whose figures are known, and the formulas taken literally."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lime_dist.analysis.spectra import (
    EPS,
    FeatureMoments,
    effective_rank,
    measure_spectra,
    renyi_entropy,
    spectrum,
)
from lime_dist.config import check_config, parse_config
from lime_dist.lime.layers import KeyValueCache
from lime_dist.lime.model import plain_model
from lime_dist.lime.values import initialize

# fp64 of some hundred terms; eigenvalues that are zero come out as 1e-16 of the largest, the root of which is 1e-8.
TOLERANCE = 1e-6


def with_eigenvalues(values: list[float], tokens: int, features: int) -> Tensor:
    """Z [tokens, features] for which Z Z^T has these and zeros."""
    generator = torch.Generator().manual_seed(4)
    left = torch.linalg.qr(torch.randn(tokens, tokens, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q
    middle = torch.zeros(tokens, features, dtype=torch.float64)
    middle.diagonal()[: len(values)] = torch.tensor(values, dtype=torch.float64).sqrt()
    return left @ middle @ right


SHAPES = [(9, 14), (14, 9), (9, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.25, 0.5, 2.0, 3.5])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_equal_eigenvalues_give_the_logarithm_of_their_number(count: int, alpha: float, shape: tuple[int, int]) -> None:
    eigenvalues = spectrum(with_eigenvalues([7.0] * count, *shape))
    assert float(renyi_entropy(eigenvalues, alpha)) == pytest.approx(math.log(count), abs=TOLERANCE)
    assert float(effective_rank(eigenvalues)) == pytest.approx(count, rel=TOLERANCE)


def test_rank_one_has_no_entropy() -> None:
    z = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 31.0))
    assert float(renyi_entropy(spectrum(z))) == pytest.approx(0.0, abs=TOLERANCE)
    assert float(effective_rank(spectrum(z))) == pytest.approx(1.0, abs=TOLERANCE)


def test_no_variance_at_all() -> None:
    eigenvalues = spectrum(torch.zeros(2, 5, 3))
    assert renyi_entropy(eigenvalues).tolist() == [0.0, 0.0] and torch.isfinite(effective_rank(eigenvalues)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_geometric_spectrum(shape: tuple[int, int]) -> None:
    """lambda = 1, 1/4, 1/16: at alpha 1/2 the roots 1, 1/2, 1/4 sum to 7/4, the trace is 21/16."""
    eigenvalues = spectrum(with_eigenvalues([1.0, 1 / 4, 1 / 16], *shape))
    assert float(renyi_entropy(eigenvalues, 0.5)) == pytest.approx(
        2 * math.log(7 / 4 / math.sqrt(21 / 16)), abs=TOLERANCE
    )
    assert float(renyi_entropy(eigenvalues, 2.0)) == pytest.approx(-math.log(273 / 441), abs=TOLERANCE)
    shares = [4 / 7, 2 / 7, 1 / 7]
    assert float(effective_rank(eigenvalues)) == pytest.approx(
        math.exp(-sum(share * math.log(share) for share in shares)), rel=TOLERANCE
    )


# ---- the formulas, literally


def literal_entropy(z: np.ndarray, alpha: float) -> float:
    kernel = z @ z.T
    eigenvalues = np.maximum(np.linalg.eigvalsh(kernel), 0)
    return float(np.log(((eigenvalues / np.trace(kernel)) ** alpha).sum()) / (1 - alpha))


def literal_rank(z: np.ndarray) -> float:
    singular = np.linalg.svd(z, compute_uv=False)
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def literal_standardised(states: np.ndarray) -> np.ndarray:
    """[samples, tokens, features]."""
    return (states - states.mean((0, 1))) / (states.std((0, 1), ddof=1) + EPS)


@pytest.mark.parametrize("shape", [(3, 9, 14), (3, 14, 9)])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_equals_the_formula(shape: tuple[int, int, int], alpha: float) -> None:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [literal_entropy(sample, alpha) for sample in z.numpy()]
    # Where tokens exceed features, the literal kernel has eigenvalues of 1e-16 in place of zeros.
    assert renyi_entropy(spectrum(z), alpha).tolist() == pytest.approx(expected, abs=1e-6)
    assert effective_rank(spectrum(z)).tolist() == pytest.approx(
        [literal_rank(sample) for sample in z.numpy()], rel=1e-6
    )


def test_moments_that_come_in_parts() -> None:
    states = torch.randn(40, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3 + 100
    moments = FeatureMoments()
    for part in states.split([7, 1, 20, 12]):
        moments.add(part)
    expected = literal_standardised(states[None].numpy())[0]
    assert np.allclose(moments.standardise(states).numpy(), expected, rtol=0, atol=1e-10)


def test_of_a_model_by_layer() -> None:
    """Standardised over all sequences and tokens of all batches, one entropy a sequence, then mean and deviation."""
    tree = {"model": dict(num_layers=3, hidden_size=16, intermediate_size=24, num_heads=2, vocab_size=40)}
    config = check_config(parse_config(tree))
    model = plain_model(config.model, config.pattern)
    initialize(model, 5)
    batches = list(torch.randint(40, (3, 2, 11), generator=torch.Generator().manual_seed(3)))
    found = measure_spectra(model, batches)

    cached = []
    for tokens in batches:
        cache = KeyValueCache()
        with torch.no_grad():
            model(tokens, *tokens.shape, model.new_memory(tokens.numel()), cache=cache)
        cached.append(cache.kv[2][1].transpose(1, 2).flatten(2).double().numpy())
    samples = literal_standardised(np.concatenate(cached))
    entropies, ranks = [literal_entropy(z, 0.5) for z in samples], [literal_rank(z) for z in samples]
    last = found["values"][2]
    assert last.entropy.mean == pytest.approx(np.mean(entropies), abs=1e-5)
    assert last.entropy.std == pytest.approx(np.std(entropies), abs=1e-5) and last.entropy.std > 1e-3
    assert last.effective_rank.mean == pytest.approx(np.mean(ranks), rel=1e-5)
    assert {kind: sorted(layers) for kind, layers in found.items()} == dict.fromkeys(
        ("hidden_states", "values", "raw_values"), [0, 1, 2]
    )
