"""What the model is built of: the operations that differ between one device and a tensor group.

Two layouts of activations are named here. *Residual*: rows are the microbatch's tokens, all of them, or
this rank's share under sequence parallelism. *Heads*: all tokens, this rank's heads. Entries live in a
third, *tokens*: this rank's share of the tokens, all heads, whatever the residual's layout is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Parts(Protocol):
    """Made once per rank; `backends.megatron.MegatronParts` is the one over a tensor group."""

    tp_size: int
    tp_rank: int
    dtype: torch.dtype
    device: torch.device

    def vocab_rows(self, vocab_size: int) -> int:
        """Rows of the embedding over the whole tensor group, padding included."""

    def column_linear(self, inputs: int, outputs: int) -> nn.Module:
        """Residual [rows, inputs] -> heads [tokens, outputs / tp]."""

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        """Heads [tokens, inputs / tp] -> residual [rows, outputs]."""

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        """Token ids [tokens] -> residual [rows, hidden]."""

    def head(self, hidden_size: int, vocab_size: int, tied: nn.Parameter | None) -> nn.Module:
        """Residual [rows, hidden] -> logits [tokens, vocabulary rows / tp], padding at -inf; `tied`: weight to use."""

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Per-token loss [tokens], fp32, of logits from `head`. May overwrite `logits`."""

    def gather_logits(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Logits over the whole vocabulary without padding: [tokens, vocab_size]. Collective: tp group."""

    def heads_to_tokens(self, kv: Tensor) -> Tensor:
        """[H_kv / tp, 2, tokens, head_dim] -> [H_kv, 2, tokens / tp, head_dim]. Collective: tp group."""

    def tokens_to_heads(self, kv: Tensor) -> Tensor:
        """The inverse of `heads_to_tokens`. Collective: tp group."""

    def residual_to_tokens(self, residual: Tensor) -> Tensor:
        """Residual [rows, width] -> this rank's share of the tokens, [tokens / tp, width], in either layout of the residual."""

    def gather_heads(self, projection: Tensor) -> Tensor:
        """Weights of this rank's heads, [H_kv / tp, ...], -> of all, [H_kv, ...], to be used on this rank's tokens.

        Their gradients are summed over the tensor group. Collective: tp group.
        """

    def for_residual(self, parameter: Tensor) -> Tensor:
        """A replicated parameter used on the residual: its gradient is summed where ranks hold different rows."""

    def for_tokens(self, parameter: Tensor) -> Tensor:
        """A replicated parameter used on entries: its gradient is summed over the tensor group."""


def empty_parameter(parts: Parts, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=parts.dtype, device=parts.device))


class PlainParts:
    """One device, plain torch: what everything else is compared with."""

    tp_size, tp_rank = 1, 0

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        self.dtype, self.device = dtype, torch.device(device)

    def vocab_rows(self, vocab_size: int) -> int:
        return vocab_size

    def column_linear(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False, dtype=self.dtype, device=self.device)

    def row_linear(self, inputs: int, outputs: int) -> nn.Module:
        return self.column_linear(inputs, outputs)

    def embedding(self, vocab_size: int, hidden_size: int) -> nn.Module:
        return nn.Embedding(vocab_size, hidden_size, dtype=self.dtype, device=self.device)

    def head(self, hidden_size: int, vocab_size: int, tied: nn.Parameter | None) -> nn.Module:
        head = self.column_linear(hidden_size, vocab_size)
        if tied is not None:
            head.weight = tied
        return head

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def gather_logits(self, logits: Tensor, vocab_size: int) -> Tensor:
        return logits[:, :vocab_size]

    def heads_to_tokens(self, kv: Tensor) -> Tensor:
        return kv

    def tokens_to_heads(self, kv: Tensor) -> Tensor:
        return kv

    def residual_to_tokens(self, residual: Tensor) -> Tensor:
        return residual

    def gather_heads(self, projection: Tensor) -> Tensor:
        return projection

    def for_residual(self, parameter: Tensor) -> Tensor:
        return parameter

    def for_tokens(self, parameter: Tensor) -> Tensor:
        return parameter
