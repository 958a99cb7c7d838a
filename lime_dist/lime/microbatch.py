"""One microbatch: token ids, which targets count how much, and which tokens see each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lime_dist.data.marks import begins, is_target, token_ids


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What a microbatch has besides token ids, where samples are whole documents or some targets do not count.

    weights: fp32 [batch, seq], by which the loss of each target is multiplied before their sum; None: the mean of all.
    documents: int64 [batch, seq], equal where inputs belong to one document; None: a sequence is one.
    """

    weights: Tensor | None
    documents: Tensor | None

    def to(self, device: torch.device) -> Examples:
        weights, documents = (
            None if each is None else _to_device(each, device) for each in (self.weights, self.documents)
        )
        return Examples(weights=weights, documents=documents)


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """tokens: ids [batch, seq + 1]."""

    tokens: Tensor
    examples: Examples | None = None

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """One token on."""
        return self.tokens[:, 1:]

    def to(self, device: torch.device, *, tokens: bool) -> Microbatch:
        """On `device`; tokens: those too."""
        examples = None if self.examples is None else self.examples.to(device)
        return Microbatch(tokens=_to_device(self.tokens, device) if tokens else self.tokens, examples=examples)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From pinned memory, so that the host goes on: a copy from other memory waits for all that the GPU was given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def read_microbatch(values: Tensor, mean_targets: float | None = None) -> Microbatch:
    """From int64 [batch, seq + 1] on the CPU, ids with marks (`data/marks.py`).

    mean_targets: the targets that count of a microbatch, on average over the global batch, so that each of them weighs the same
    wherever it lies; None: this one is the whole batch.
    """
    tokens = token_ids(values)
    if torch.equal(tokens, values) and mean_targets in (None, values[:, 1:].numel()):
        return Microbatch(tokens=values)
    counts = is_target(values[:, 1:])
    # A mean may be less than one; a batch without targets has no weight either way.
    weights = counts / ((float(counts.sum()) if mean_targets is None else mean_targets) or 1.0)
    beginnings = begins(values[:, :-1])
    documents = beginnings.cumsum(1) if bool(beginnings[:, 1:].any()) else None
    return Microbatch(tokens=tokens, examples=Examples(weights=weights, documents=documents))


def count_targets(values: Tensor) -> int:
    """Those that count, of int64 [batch, seq + 1]."""
    return int(is_target(values[:, 1:]).sum())


def visible(documents: Tensor) -> Tensor:
    """Which inputs each sees: bool [batch, 1, seq, seq], earlier ones of its own document and itself."""
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()
