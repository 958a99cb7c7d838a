"""Token separability: how well a linear classifier tells "is", "are", "was" and "were" by a layer's representations.

After arXiv 2502.09245v2: a linear 4-way classifier, Adam at 1e-2, one epoch in batches of 64, 5-fold
cross-validation; features as they are, not scaled. Chance is 1/4. One epoch of more occurrences is more updates: only accuracies
of as many occurrences can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from lime_dist.analysis.activations import HIDDEN_STATES, VALUES, collect
from lime_dist.analysis.occurrences import WORDS, Occurrence
from lime_dist.analysis.spectra import Spread
from lime_dist.lime.model import LimeChunk

PROBED = (HIDDEN_STATES, VALUES)
# Of each word: one epoch is then five updates of at most 0.01 a weight; fewer learn hardly anything.
MIN_OCCURRENCES = 100
MAX_OCCURRENCES = 1000
FOLDS, BATCH_SIZE, LEARNING_RATE = 5, 64, 1e-2


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """features: kind -> layer -> fp32 [examples, features]; labels [examples]. All on the CPU."""

    features: dict[str, dict[int, Tensor]]
    labels: Tensor


def collect_examples(
    model: LimeChunk,
    occurrences: Sequence[Occurrence],
    inputs_of: Callable[[int], numpy.ndarray],
    *,
    sequences_at_once: int,
) -> Examples:
    """The representations at each occurrence, which come in the order of their sequences. inputs_of: token ids [seq]."""
    places = {sequence: list(group) for sequence, group in groupby(occurrences, lambda found: found.sequence)}
    parts: dict[tuple[str, int], list[Tensor]] = {}
    sequences = list(places)
    for start in range(0, len(sequences), sequences_at_once):
        some = sequences[start : start + sequences_at_once]
        tokens = torch.from_numpy(numpy.stack([inputs_of(sequence) for sequence in some])).to(model.device)
        rows = [row for row, sequence in enumerate(some) for _ in places[sequence]]
        positions = [found.position for sequence in some for found in places[sequence]]
        states = collect(model, tokens)
        for kind in PROBED:
            for layer, values in states[kind].items():
                parts.setdefault((kind, layer), []).append(values[rows, positions].float().cpu())
    features: dict[str, dict[int, Tensor]] = {}
    for (kind, layer), found in parts.items():
        features.setdefault(kind, {})[layer] = torch.cat(found)
    return Examples(features=features, labels=torch.tensor([found.label for found in occurrences]))


def separability(features: Tensor, labels: Tensor, seed: int = 0) -> Spread:
    """Accuracy on the held-out fold, mean and deviation over folds. features [examples, features] in fp32."""
    generator = torch.Generator().manual_seed(seed)
    folds = torch.randperm(len(labels), generator=generator).tensor_split(FOLDS)
    accuracies = []
    for index, held_out in enumerate(folds):
        known = torch.cat([fold for other, fold in enumerate(folds) if other != index])
        weight, bias = _train(features[known], labels[known], generator)
        guesses = F.linear(features[held_out], weight, bias).argmax(-1)
        accuracies.append(float((guesses == labels[held_out]).double().mean()))
    return Spread.over(accuracies)


def _train(features: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Begins as `nn.Linear` does: uniform(+-1/sqrt(features))."""
    bound = features.shape[1] ** -0.5
    weight = torch.empty(len(WORDS), features.shape[1]).uniform_(-bound, bound, generator=generator).requires_grad_()
    bias = torch.empty(len(WORDS)).uniform_(-bound, bound, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    for rows in torch.randperm(len(labels), generator=generator).split(BATCH_SIZE):
        optimizer.zero_grad()
        F.cross_entropy(F.linear(features[rows], weight, bias), labels[rows]).backward()
        optimizer.step()
    return weight.detach(), bias.detach()
