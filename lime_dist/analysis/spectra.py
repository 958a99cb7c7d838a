"""How many directions the representations of a text take: matrix-based Renyi entropy, effective rank.

For one sequence with Z [tokens, features], each feature standardised over all sequences and tokens, lambda_i the
eigenvalues of K = Z Z^T (those of Z^T Z but for zeros, so the smaller of both is made):

    S_alpha = log(sum_i (lambda_i / tr K)^alpha) / (1 - alpha)      (Giraldo et al. 2014; Skean et al. 2023)

with alpha = 0.5 as in arXiv 2502.09245v2, and

    erank = exp(-sum_i p_i log p_i),  p_i = sigma_i / sum_j sigma_j,  sigma_i = sqrt(lambda_i)      (Roy and Vetterli 2007).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lime_dist.analysis.activations import collect
from lime_dist.lime.model import LimeChunk

ALPHA = 0.5
EPS = 1e-5  # beside the standard deviation, as in the authors' code


class FeatureMoments:
    """Mean and standard deviation of each feature over rows that come in parts (Chan, Golub and LeVeque 1979), fp64."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """[rows, features]."""
        rows = rows.double()
        count, mean = len(rows), rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if not self._count:
            self._count, self._mean, self._squares = count, mean, squares
            return
        total = self._count + count
        distance = mean - self._mean
        self._mean = self._mean + distance * (count / total)
        self._squares = self._squares + squares + distance.square() * (self._count * count / total)
        self._count = total

    def standardise(self, rows: Tensor) -> Tensor:
        """[..., features] in fp64: (x - mean) / (standard deviation + eps), the deviation that of a sample (n - 1)."""
        deviation = (self._squares / max(1, self._count - 1)).sqrt()
        return (rows.double() - self._mean) / (deviation + EPS)


def spectrum(z: Tensor) -> Tensor:
    """[..., min(tokens, features)]: the eigenvalues of Z Z^T that can be above zero, ascending; rounding below zero is zero."""
    z = z.double()
    gram = z @ z.mT if z.shape[-2] <= z.shape[-1] else z.mT @ z
    values = torch.linalg.eigvalsh(gram)
    noise = values[..., -1:] * gram.shape[-1] * torch.finfo(torch.float64).eps
    return torch.where(values > noise, values, 0.0)


def renyi_entropy(eigenvalues: Tensor, alpha: float = ALPHA) -> Tensor:
    """[...] in nats of eigenvalues [..., n]; of zeros alone zero."""
    shares = _shares(eigenvalues)
    powers = torch.where(shares > 0, shares**alpha, 0.0).sum(-1)
    return torch.where(powers > 0, powers.log() / (1 - alpha), 0.0)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """[...] of the eigenvalues of Z Z^T [..., n]."""
    shares = _shares(eigenvalues.sqrt())
    return torch.special.entr(shares).sum(-1).exp()


def _shares(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and standard deviation over sequences."""

    mean: float
    std: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread:
        mean = sum(values) / len(values)
        return cls(mean=mean, std=math.sqrt(sum((value - mean) ** 2 for value in values) / len(values)))


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Of one kind of representation behind one layer."""

    entropy: Spread
    effective_rank: Spread


def measure_spectra(model: LimeChunk, batches: Sequence[Tensor]) -> dict[str, dict[int, Spectrum]]:
    """kind -> layer, of token ids [batch, seq]: two passes over the text, as nothing but moments and figures is kept."""
    moments: dict[tuple[str, int], FeatureMoments] = {}
    for tokens in batches:
        for place, states in _flat(model, tokens):
            moments.setdefault(place, FeatureMoments()).add(states.flatten(0, 1))
    entropies: dict[tuple[str, int], list[float]] = {place: [] for place in moments}
    ranks: dict[tuple[str, int], list[float]] = {place: [] for place in moments}
    for tokens in batches:
        for place, states in _flat(model, tokens):
            eigenvalues = spectrum(moments[place].standardise(states))
            entropies[place] += renyi_entropy(eigenvalues).tolist()
            ranks[place] += effective_rank(eigenvalues).tolist()
    found: dict[str, dict[int, Spectrum]] = {}
    for (kind, layer), values in entropies.items():
        rank = Spread.over(ranks[kind, layer])
        found.setdefault(kind, {})[layer] = Spectrum(entropy=Spread.over(values), effective_rank=rank)
    return found


def _flat(model: LimeChunk, tokens: Tensor) -> list[tuple[tuple[str, int], Tensor]]:
    return [
        ((kind, layer), states) for kind, layers in collect(model, tokens).items() for layer, states in layers.items()
    ]
