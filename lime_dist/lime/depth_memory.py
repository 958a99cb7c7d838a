"""Depth memory: the entries and partial sums of one microbatch on one chunk, each held once.

The authors' code grows a buffer by `cat` at every layer and keeps each copy for the backward pass:
L(L+1)/2 - 1 entries. Here one buffer is written once, a read is one matrix product over a view of it, and
the backward pass adds into one gradient buffer of the same shape. The operations are tied into autograd by a
chain of empty tensors, so that each one's backward runs after those of all later operations.

The first slots are the entries received from the chunk before, and the buffer itself is what is sent on: a
relayed entry is never copied. `sums` holds, for each reader on this chunk or later that has something to add
up across chunks, what has been added so far; it arrives and leaves in the same way.

A later chunk of the same stage reads entries where an earlier one keeps them, and adds their gradients there. No graph
leads from one to the other: chunks go back last to first, so that when a chunk goes back, its gradients are complete
but for what the chunk behind it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lime_dist.plan.schedule import Kind
from lime_dist.plan.transfer import ChunkTransfer

Reach = Callable[[Kind, int], None]  # the kind of pass, the layer that it is at

_CACHE_LINE_BYTES = 64


class GradientShares(RuntimeError):
    """A gradient is taken that has other shares than planned: a defect, and weights would go wrong without a word."""


class Buffer:
    """Rows [H_kv, row_size] by layer in one tensor [rows, H_kv, row_size], and their gradients in another."""

    def __init__(
        self,
        shares: Mapping[int, int],
        num_kv_heads: int,
        row_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        spaced: bool = False,
    ):
        """shares: of how many shares each layer's gradient is the sum, by layer in the order of rows.

        spaced: leave a cache line between rows. On a CPU rows a power of two apart evict each other, which can
        double the time of a product; but only neighbouring rows can be sent as they are.
        """
        self.slot_of = {layer: slot for slot, layer in enumerate(shares)}
        self._shape = len(shares), num_kv_heads, row_size
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._gap = _CACHE_LINE_BYTES // dtype.itemsize if spaced else 0
        self.values = self._new()
        self._gradients: Tensor | None = None
        self._planned_shares, self._shares = shares, [0] * len(shares)  # those added so far, by slot

    def _new(self) -> Tensor:
        rows, num_kv_heads, row_size = self._shape
        return torch.empty(rows, num_kv_heads, row_size + self._gap, **self._options)[..., :row_size]

    @property
    def gradients(self) -> Tensor:
        """Same shape as `values`; anything where no share has been added."""
        if self._gradients is None:
            self._gradients = self._new()
        return self._gradients

    def begin_shares(self, first: int, counts: Sequence[int]) -> bool:
        """Before as many shares are added to the slots from `first` on. Whether none of them has one yet, so that the
        first may be written over whatever is there; else those without are made zero.
        """
        slots = range(first, first + len(counts))
        empty = [slot for slot in slots if not self._shares[slot]]
        for slot, count in zip(slots, counts):
            self._shares[slot] += count
        if len(empty) == len(counts):
            return True
        for slot in empty:
            self.gradients[slot].zero_()
        return False

    def check_shares(self, layers: Sequence[int]) -> None:
        """Before the gradients of `layers` are taken. Raises: GradientShares unless all their shares have been added."""
        for layer in layers:
            slot, planned = self.slot_of[layer], self._planned_shares[layer]
            if self._shares[slot] != planned:
                raise GradientShares(
                    f"{self._shares[slot]} of {planned} shares of the gradient of layer {_layer_of(layer)} have come"
                )
            if not planned:  # nothing reads the entry, so nothing has written its gradient
                self.gradients[slot].zero_()

    def release_values(self) -> None:
        """After the forward pass, where the backward needs the gradients only."""
        del self.values

    def runs(self, layers: Sequence[int]) -> tuple[Run, ...]:
        """The slots of `layers`, in their order, as runs of neighbours."""
        return _join([(self, self.slot_of[layer]) for layer in layers])

    def select(self, layers: Sequence[int]) -> Tensor:
        """Values of `layers` as one contiguous [n, H_kv, row_size]: a view where the slots are neighbours."""
        return _one(self.values, [run.values for run in self.runs(layers)])

    def select_gradients(self, layers: Sequence[int]) -> Tensor:
        """Raises: GradientShares unless they are whole."""
        self.check_shares(layers)
        return _one(self.gradients, [run.gradients for run in self.runs(layers)])

    def new_rows(self, count: int) -> Tensor:
        """[count, H_kv, row_size], not initialised."""
        return torch.empty(count, *self._shape[1:], **self._options)

    def room_for(self, layers: Sequence[int]) -> Tensor:
        """Where to receive the values of `layers`: their own slots where these are neighbours, else a tensor to `load`."""
        return self.select(layers) if len(self.runs(layers)) == 1 else self.new_rows(len(layers))

    def load(self, layers: Sequence[int], values: Tensor) -> None:
        """Put received values in their slots; nothing to do for those that were received in place."""
        for run, part in _parts(self.runs(layers), values):
            if part.data_ptr() != run.values.data_ptr():
                run.values.copy_(part)

    def add_gradients(self, layers: Sequence[int], gradients: Tensor) -> None:
        """Add what the next chunk returned for `layers` to what readers here have left."""
        for run, part in _parts(self.runs(layers), gradients):
            if self.begin_shares(run.first, [1] * run.size):
                run.gradients.copy_(part)
            else:
                run.gradients.add_(part)


@dataclass(frozen=True)
class Run:
    """Neighbouring slots `first` to `stop` - 1 of one buffer."""

    buffer: Buffer
    first: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.first

    @property
    def values(self) -> Tensor:
        """[size, H_kv, row_size]."""
        return self.buffer.values[self.first : self.stop]

    @property
    def gradients(self) -> Tensor:
        """[size, H_kv, row_size]; anything where no share has been added."""
        return self.buffer.gradients[self.first : self.stop]

    def add_product(self, weights: Tensor, gradient: Tensor, counts: Sequence[int]) -> None:
        """Add `counts` shares to the gradients: weights [size * H_kv, n] x gradient [n, row_size]."""
        target = self.gradients.flatten(0, 1)
        if self.buffer.begin_shares(self.first, counts):
            torch.mm(weights, gradient, out=target)
        else:
            target.addmm_(weights, gradient)


def _join(slots: Sequence[tuple[Buffer, int]]) -> tuple[Run, ...]:
    """Slots in their order as runs of neighbours."""
    runs: list[Run] = []
    for buffer, slot in slots:
        if runs and runs[-1].buffer is buffer and runs[-1].stop == slot:
            runs[-1] = Run(buffer, runs[-1].first, slot + 1)
        else:
            runs.append(Run(buffer, slot, slot + 1))
    return tuple(runs)


def _one(whole: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """`parts` of `whole` one after the other; a view of it where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts)) if parts else whole[:0]


def _parts(runs: Sequence[Run], tensor: Tensor) -> Iterator[tuple[Run, Tensor]]:
    """Each run with its rows of `tensor`, which holds them one after the other."""
    return zip(runs, tensor.split([run.size for run in runs])) if runs else iter(())


class DepthMemory:
    """Entries (received ones first) and sums (by reader) of one microbatch.

    An entry of keys and values is [H_kv, 2 (K, V), tokens, head_dim], flattened behind the heads, so that routing
    over (layer, head) is one [H_kv, n * H_kv] x [n * H_kv, 2 * tokens * head_dim] product. One of a hidden state is
    [tokens, hidden] under a single head; `hidden.MixAndProject` reads it, and there are no sums.
    """

    def __init__(
        self,
        transfer: ChunkTransfer,
        own_entries: Sequence[int],
        blocks: Sequence[range],
        num_kv_heads: int,
        row_size: int,
        *,
        dtype: torch.dtype,
        sum_dtype: torch.dtype,
        device: torch.device,
        kept: Mapping[int, DepthMemory] | None = None,
        reach: Reach = lambda kind, layer: None,
    ):
        """kept: the memories of those earlier chunks of this stage, by chunk, whose entries this chunk reads.

        reach: called whenever a pass is at a layer that leaves an entry, for what arrives or leaves at that moment:
        forward behind the layer's writing and before its read, backward in between the other way round.
        """
        self.received, self.own = transfer.received.raw_entries, tuple(own_entries)
        # What the last layer of a block leaves is the block's sum, in that layer's slot; its own entry lies apart.
        self._blocks = {block[-1]: block for block in blocks}
        shares = {layer: transfer.shares[layer] for layer in (*self.received, *self.own)}
        for block in blocks:
            # The sum of a block is one more reader of its members. The last of them reads its own entry, which lies apart.
            last, reads_itself = block[-1], int(transfer.pattern.has_router(block[-1]))
            shares.update({member: shares[member] + 1 for member in block[:-1]})
            shares.update({last: shares[last] - reads_itself, _apart(last): reads_itself + 1})
        travelling = transfer.received.raw_entries or transfer.sent.raw_entries
        self.entries = Buffer(shares, num_kv_heads, row_size, dtype, device, spaced=not travelling)
        # Of a sum, that of its reader or of the next chunk.
        sum_shares = dict.fromkeys(transfer.summed_readers, 1)
        self.sums = Buffer(sum_shares, num_kv_heads, row_size, sum_dtype, device)
        self._kept = {layer: (kept or {})[chunk].entries for chunk, layers in transfer.kept.items() for layer in layers}
        self._begun = set(transfer.received.partial_sums)  # rows that hold a sum already
        self._reach = reach

    def start(self) -> Tensor:
        """The beginning of the chain, which leads to the gradients of received entries even where no weights are learned."""
        return self.entries.values.new_empty(0, requires_grad=torch.is_grad_enabled())

    def write(self, layer: int, entry: Tensor, chain: Tensor) -> Tensor:
        """Put `entry` (of an entry's elements, any strides) in its slot; returns the chain behind it."""
        chain = _Write.apply(entry, chain, self.entries, self._own_key(layer))
        if layer in self._blocks:
            members = [self._own_key(member) for member in self._blocks[layer]]
            chain = _SumBlock.apply(chain, self.entries, members, layer)
        return _Reach.apply(chain, self._reach, layer)

    def runs_read(self, reader: int, sources: tuple[int, ...]) -> tuple[Run, ...]:
        """Where a layer's `sources` lie; of a block that it ends it reads its own entry."""
        return _join([self._find(self._own_key(source) if source == reader else source) for source in sources])

    def runs_before(self) -> tuple[Run, ...]:
        """Where the entries lie that this chunk reads and has not made: kept ones, then those received."""
        return _join([self._find(layer) for layer in (*self._kept, *self.received)])

    def runs_made(self) -> tuple[Run, ...]:
        """Where the entries lie that this chunk makes for later layers."""
        return self.entries.runs(self.own)

    def layers_of(self, run: Run) -> tuple[int, ...]:
        """The layers in the slots of `run`."""
        return tuple(layer for layer, slot in run.buffer.slot_of.items() if run.first <= slot < run.stop)

    def _find(self, key: int) -> tuple[Buffer, int]:
        buffer = self._kept.get(key, self.entries)
        return buffer, buffer.slot_of[key]

    def _own_key(self, layer: int) -> int:
        """Under which a layer's own entry lies."""
        return _apart(layer) if layer in self._blocks else layer

    def add_to_sums(
        self, weights: dict[int, Tensor], sources: dict[int, tuple[int, ...]], run: Run, chain: Tensor
    ) -> Tensor:
        """Add entries into the sums of several readers in one matrix product; returns the chain behind it.

        weights[j] [H_kv, n_j, H_kv] over sources[j], all of them in `run`.
        """
        readers = tuple(weights)
        if not readers:
            return chain
        among = self.layers_of(run)
        stacked = torch.cat([_over(among, sources[reader], weights[reader]) for reader in readers])
        fresh = tuple(reader not in self._begun for reader in readers)
        self._begun.update(readers)
        row_runs = self._row_runs(readers, fresh)
        return _AddToSums.apply(stacked, chain, self.sums, sources, row_runs, run, among)

    def read(self, reader: int, router: Tensor, sources: tuple[int, ...], chain: Tensor) -> Tensor:
        """sum_{i, h'} router[h, i, h'] * entry_i[h'] over own `sources`, plus the reader's sum if it has one
        (arXiv 2502.09245v2, eq. 3): [H_kv, row_size].
        """
        return _Read.apply(router, chain, self.sums, self.runs_read(reader, sources), self.sums.slot_of.get(reader))

    def _row_runs(self, readers: tuple[int, ...], fresh: tuple[bool, ...]) -> tuple[tuple[int, int, bool], ...]:
        """Runs of neighbouring rows that are all fresh or all begun."""
        runs: list[tuple[int, int, bool]] = []
        for reader, is_fresh in zip(readers, fresh):
            row = self.sums.slot_of[reader]
            if runs and runs[-1][1] == row and runs[-1][2] == is_fresh:
                runs[-1] = (runs[-1][0], row + 1, is_fresh)
            else:
                runs.append((row, row + 1, is_fresh))
        return tuple(runs)


def _apart(layer: int) -> int:
    """The key of a slot beside that of `layer`."""
    return -1 - layer


def _layer_of(key: int) -> int:
    return key if key >= 0 else _apart(key)


def _over(among: tuple[int, ...], sources: tuple[int, ...], weights: Tensor) -> Tensor:
    """Router columns [H_kv, len(among) * H_kv]: `weights` at `sources`, zero at the other layers of `among`."""
    if sources == among:
        return weights.flatten(1)
    columns = _index(tuple(among.index(source) for source in sources), weights.device)
    num_heads = weights.shape[0]
    return weights.new_zeros(num_heads, len(among), num_heads).index_copy(1, columns, weights).flatten(1)


@cache
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: each copy from the host holds the host until the device has done all that it was given."""
    with torch.inference_mode(False):  # else autograd could not keep it for a later backward pass
        return torch.tensor(places, device=device)


class _Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entry: Tensor, chain: Tensor, entries: Buffer, key: int) -> Tensor:
        entries.select((key,))[0].view(entry.shape).copy_(entry)
        ctx.entries, ctx.key, ctx.entry_shape = entries, key, entry.shape
        return chain.new_empty(0)

    @staticmethod
    def backward(ctx, chain_gradient: Tensor):
        return ctx.entries.select_gradients((ctx.key,))[0].view(ctx.entry_shape), chain_gradient, None, None


class _Reach(torch.autograd.Function):
    """Tells both passes that they are at a layer. A layer computed again in the backward pass says so again."""

    @staticmethod
    def forward(ctx, chain: Tensor, reach: Reach, layer: int) -> Tensor:
        ctx.reach, ctx.layer = reach, layer
        reach(Kind.FORWARD, layer)
        return chain.new_empty(0)

    @staticmethod
    def backward(ctx, chain_gradient: Tensor):
        ctx.reach(Kind.BACKWARD, ctx.layer)
        return chain_gradient, None, None


class _SumBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain: Tensor, entries: Buffer, members: list[int], key: int) -> Tensor:
        torch.sum(entries.select(members), dim=0, out=entries.select((key,))[0])
        ctx.entries, ctx.members, ctx.key = entries, members, key
        return chain.new_empty(0)

    @staticmethod
    def backward(ctx, chain_gradient: Tensor):
        gradient = ctx.entries.select_gradients((ctx.key,))
        for member in ctx.members:
            ctx.entries.add_gradients((member,), gradient)
        return chain_gradient, None, None, None


# In the two below the buffers are kept on ctx and not by save_for_backward: other slots are written after the
# operation, which autograd's version counter would take for a change of what was read.


class _AddToSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, stacked: Tensor, chain: Tensor, sums_of: Buffer, sources: dict, rows: tuple, run: Run, among: tuple
    ) -> Tensor:
        ctx.save_for_backward(stacked)
        ctx.sums_of, ctx.sources, ctx.rows, ctx.run, ctx.among = sums_of, sources, rows, run, among
        values = run.values.flatten(0, 1)
        for weights, sums, fresh in _by_rows(stacked, sums_of.values, rows):
            _accumulate(sums, weights, values, fresh)
        return chain.new_empty(0)

    @staticmethod
    def backward(ctx, chain_gradient: Tensor):
        (stacked,) = ctx.saved_tensors
        ctx.sums_of.check_shares(tuple(ctx.sources))
        values, shares = ctx.run.values.flatten(0, 1), _shares_among(ctx.among, ctx.sources)
        stacked_gradient, sum_gradients = torch.empty_like(stacked), ctx.sums_of.gradients
        for (weights, sums, _), (target, _, _) in zip(
            _by_rows(stacked, sum_gradients, ctx.rows), _by_rows(stacked_gradient, sum_gradients, ctx.rows)
        ):
            sums = sums.to(values.dtype)
            target.copy_(torch.mm(sums, values.t()))
            ctx.run.add_product(weights.t(), sums, shares)
            shares = [0] * len(shares)
        return stacked_gradient, chain_gradient, None, None, None, None, None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, router: Tensor, chain: Tensor, sums_of: Buffer, runs: tuple[Run, ...], row: int | None) -> Tensor:
        ctx.save_for_backward(router)
        ctx.sums_of, ctx.runs, ctx.row = sums_of, runs, row
        routed: Tensor | None = sums_of.values[row] if row is not None else None
        if routed is not None and routed.dtype != router.dtype:
            for weights, run in _per_run(router, runs):
                routed = routed + torch.mm(weights, run.values.flatten(0, 1))
            return routed.to(router.dtype)
        for weights, run in _per_run(router, runs):
            values = run.values.flatten(0, 1)
            routed = torch.mm(weights, values) if routed is None else torch.addmm(routed, weights, values)
        assert routed is not None  # a reader has sources
        return routed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (router,) = ctx.saved_tensors
        gradient = gradient.contiguous()
        if ctx.row is not None:
            ctx.sums_of.begin_shares(ctx.row, [1])
            ctx.sums_of.gradients[ctx.row].copy_(gradient)
        router_gradient = torch.empty_like(router)
        for (target, run), (weights, _) in zip(_per_run(router_gradient, ctx.runs), _per_run(router, ctx.runs)):
            target.copy_(torch.mm(gradient, run.values.flatten(0, 1).t()))
            run.add_product(weights.t(), gradient, [1] * run.size)
        return router_gradient, gradient.new_zeros(0), None, None, None


def _shares_among(layers: Sequence[int], sources: Mapping[int, tuple[int, ...]]) -> list[int]:
    """By layer, how many of the readers add it."""
    return [sum(layer in some for some in sources.values()) for layer in layers]


def _accumulate(sums: Tensor, weights: Tensor, values: Tensor, fresh: bool) -> None:
    if sums.dtype != values.dtype:
        product = torch.mm(weights, values)
        sums.copy_(product) if fresh else sums.add_(product)
    elif fresh:
        torch.mm(weights, values, out=sums)
    else:
        sums.addmm_(weights, values)


def _by_rows(
    stacked: Tensor, buffer: Tensor, rows: tuple[tuple[int, int, bool], ...]
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """For each run of rows, the stacked weights [k * H_kv, n * H_kv], the buffer's rows [k * H_kv, row_size], whether fresh."""
    num_heads, taken = buffer.shape[1], 0
    for first, stop, fresh in rows:
        height = (stop - first) * num_heads
        yield stacked[taken : taken + height], buffer[first:stop].flatten(0, 1), fresh
        taken += height


def _per_run(router: Tensor, runs: Sequence[Run]) -> Iterator[tuple[Tensor, Run]]:
    """Each run with the router's columns for it [H_kv, size * H_kv]."""
    column = 0
    for run in runs:
        yield router[:, column : column + run.size].flatten(1), run
        column += run.size
