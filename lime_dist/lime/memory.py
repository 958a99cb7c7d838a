"""Depth memory: the entries of one microbatch, each held once, and the routed read over them.

The authors' code grows a buffer by `cat` at every layer and keeps each copy for the backward pass:
L(L+1)/2 - 1 entries. Here one buffer of L slots is written once, a read is one matrix product over a
view of it, and the backward pass adds into one gradient buffer of the same shape. Reads and writes are
tied into autograd by a chain of empty tensors ("tokens"): a write's backward runs after that of every
later read. The first slots are the entries received from the stage before, the buffer itself is what is
sent on: a relayed entry is never copied.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DepthMemory:
    """Entries of `layers` (ascending, received ones first) as one buffer [len(layers), H_kv, 2 * tokens * head_dim].

    An entry is [H_kv, 2 (K, V), tokens, head_dim], flattened behind the heads, so that routing over
    (layer, head) is one [H_kv, n * H_kv] x [n * H_kv, 2 * tokens * head_dim] product.
    """

    def __init__(
        self, layers: tuple[int, ...], num_kv_heads: int, row_size: int, *, dtype: torch.dtype, device: torch.device
    ):
        self.slot_of = {layer: slot for slot, layer in enumerate(layers)}
        self.values = torch.empty(len(layers), num_kv_heads, row_size, dtype=dtype, device=device)
        self._gradients: Tensor | None = None

    @property
    def gradients(self) -> Tensor:
        """Same shape as `values`; zero where nothing has been added."""
        if self._gradients is None:
            self._gradients = torch.zeros_like(self.values)
        return self._gradients

    def start(self) -> Tensor:
        """The first token of the chain."""
        return self.values.new_empty(0)

    def write(self, layer: int, entry: Tensor, token: Tensor) -> Tensor:
        """Put `entry` ([H_kv, 2, tokens, head_dim], any strides) in its slot; returns the next token."""
        return _Write.apply(entry, token, self, self.slot_of[layer])

    def read(self, router: Tensor, sources: tuple[int, ...], token: Tensor) -> Tensor:
        """sum_{i, h'} router[h, i, h'] * entry_i[h'] over `sources` (arXiv 2502.09245v2, eq. 3): [H_kv, row_size]."""
        return _Read.apply(router, token, self, self._runs(sources))

    def select(self, layers: tuple[int, ...]) -> Tensor:
        """Entries of `layers` as one contiguous [n, H_kv, row_size]: a view where the slots are neighbours."""
        return _rows(self.values, self._runs(layers))

    def select_gradients(self, layers: tuple[int, ...]) -> Tensor:
        """Gradients of the entries of `layers`, as `select`."""
        return _rows(self.gradients, self._runs(layers))

    def load_gradients(self, layers: tuple[int, ...], gradients: Tensor) -> None:
        """Start the backward pass from what the next stage returned for `layers`; takes the tensor over."""
        if len(layers) == len(self.slot_of):
            self._gradients = gradients
            return
        for layer, gradient in zip(layers, gradients):
            self.gradients[self.slot_of[layer]].add_(gradient)

    def _runs(self, layers: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """The slots of `layers` as half-open runs of neighbours."""
        runs: list[tuple[int, int]] = []
        for layer in layers:
            slot = self.slot_of[layer]
            if runs and runs[-1][1] == slot:
                runs[-1] = (runs[-1][0], slot + 1)
            else:
                runs.append((slot, slot + 1))
        return tuple(runs)


def _rows(buffer: Tensor, runs: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [buffer[first:stop] for first, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else buffer[:0]


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entry: Tensor, token: Tensor, memory: DepthMemory, slot: int) -> Tensor:
        memory.values[slot].view(entry.shape).copy_(entry)
        ctx.memory, ctx.slot, ctx.entry_shape = memory, slot, entry.shape
        return token.new_empty(0)

    @staticmethod
    def backward(ctx, token_gradient: Tensor):
        return ctx.memory.gradients[ctx.slot].view(ctx.entry_shape), token_gradient, None, None


class _Read(torch.autograd.Function):
    # The buffer is kept on ctx and not by save_for_backward: other slots are written after this read,
    # which autograd's version counter would take for a change of what was read.
    @staticmethod
    def forward(ctx, router: Tensor, token: Tensor, memory: DepthMemory, runs: tuple[tuple[int, int], ...]) -> Tensor:
        ctx.save_for_backward(router)
        ctx.memory, ctx.runs = memory, runs
        routed = None
        for weights, values in _per_run(router, memory.values, runs):
            routed = torch.mm(weights, values) if routed is None else routed.addmm_(weights, values)
        return routed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (router,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        router_gradient = torch.empty_like(router)
        column = 0
        for first, stop in ctx.runs:
            values = ctx.memory.values[first:stop].flatten(0, 1)
            router_gradient[:, column : column + stop - first] = torch.mm(gradient, values.t()).view(
                router.shape[0], stop - first, -1
            )
            column += stop - first
        for weights, entry_gradients in _per_run(router, ctx.memory.gradients, ctx.runs):
            entry_gradients.addmm_(weights.t(), gradient)
        return router_gradient, torch.zeros(0, dtype=gradient.dtype, device=gradient.device), None, None


def _per_run(router: Tensor, buffer: Tensor, runs: tuple[tuple[int, int], ...]):
    """For each run of slots, the router's columns [H_kv, k * H_kv] and the buffer's rows [k * H_kv, row_size]."""
    column = 0
    for first, stop in runs:
        width = stop - first
        yield router[:, column : column + width].flatten(1), buffer[first:stop].flatten(0, 1)
        column += width
