"""The depth memory against the sums written out, in float64, with autograd's gradients of the latter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lime_dist.depth.pattern import Pattern, parse_pattern
from lime_dist.lime.depth_memory import DepthMemory, GradientShares, Run
from lime_dist.plan.partition import plan_partition
from lime_dist.plan.transfer import ChunkTransfer, plan_transfer

HEADS, TOKENS, HEAD_DIM = 3, 4, 2
ROW = 2 * TOKENS * HEAD_DIM
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, a few dozen additions

GAPS = Pattern("gaps", ((0,), (0, 1), (2,), (0, 2, 3), (1, 4), (0, 1, 3, 5), (1, 2, 4, 6), (0, 3, 5, 7)))
CASES = [
    (pattern, counts)
    for pattern in ("full", "last:2", "stride:3", GAPS)
    for counts in ([8], [3, 5], [2, 3, 3], [1, 3, 1, 3])
]
BLOCKS = [  # a block's sum is one entry for later layers; the layers of the block see their own entries
    ("block:2", [8]),
    ("block:2", [2, 4, 2]),
    ("block:2+first:1", [4, 4]),
    ("block:3", [3, 3, 2]),
    ("block:3+last:2", [3, 5]),
]


@pytest.mark.parametrize("policy", ["relay", "least"])
@pytest.mark.parametrize(("pattern", "counts"), CASES + BLOCKS, ids=str)
def test_reads_sums_and_all_gradients(pattern: str | Pattern, counts: list[int], policy: str) -> None:
    pattern = parse_pattern(pattern, 8) if isinstance(pattern, str) else pattern
    stages = plan_partition(8, len(counts), counts)
    plan = plan_transfer(pattern, stages, policy=policy)
    for index, layers in enumerate(stages):
        stage = Stage(plan.chunk(index), layers)
        for actual, expected in zip(stage.through_memory(), stage.written_out(), strict=True):
            assert actual.keys() == expected.keys()
            assert [name for name in expected if not torch.allclose(actual[name], expected[name], **EXACT)] == []


class Stage:
    """One stage's inputs, and gradients of its outputs, at random."""

    def __init__(self, transfer: ChunkTransfer, layers: range):
        generator = torch.Generator().manual_seed(1)

        def rows(names: tuple[int, ...]) -> dict[int, Tensor]:
            return {n: torch.randn(HEADS, ROW, dtype=torch.float64, generator=generator) for n in names}

        self.transfer, self.layers = transfer, layers
        self.own = transfer.own_entries(layers)
        self.entries, self.sums = rows(transfer.received.raw_entries), rows(transfer.received.partial_sums)
        self.own_entries = rows(self.own)
        self.routers = {
            reader: torch.randn(HEADS, len(sources), HEADS, dtype=torch.float64, generator=generator)
            for reader, sources in transfer.reads.items()
        }
        self.readers = tuple(reader for reader in transfer.reads if reader in layers)
        self.read_gradients = rows(self.readers)
        self.sent_gradients = rows(transfer.sent.raw_entries), rows(transfer.sent.partial_sums)

    def leaves(self) -> list[dict[int, Tensor]]:
        """Routers, own entries, received entries, received sums: fresh, to be differentiated."""
        groups = self.routers, self.own_entries, self.entries, self.sums
        return [{name: value.clone().requires_grad_() for name, value in group.items()} for group in groups]

    def written_out(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and gradients by the formula: sum over i of router[:, i, :] times entry i, plus what has been summed before."""
        routers, own, received, sums = self.leaves()
        entries = received | own
        blocks = {block[-1]: sum(own[layer] for layer in block) for block in self.transfer.own_blocks(self.layers)}
        totals = dict(sums)
        for reader, sources in self.transfer.reads.items():
            seen = [entries[source] if source == reader else (entries | blocks)[source] for source in sources]
            totals[reader] = torch.einsum("hik,ikr->hr", routers[reader], torch.stack(seen)) + totals.get(reader, 0)
        sent = self.transfer.sent
        outputs = {f"read {reader}": totals[reader] for reader in self.readers}
        outputs |= {f"entry {layer}": (entries | blocks)[layer] for layer in sent.raw_entries}
        outputs |= {f"sum {reader}": totals[reader] for reader in sent.partial_sums}
        into = [*self.read_gradients.values(), *self.sent_gradients[0].values(), *self.sent_gradients[1].values()]
        torch.autograd.backward(list(outputs.values()), into)
        gradients = {
            f"{kind} {name}": leaf.grad
            for kind, group in zip(("router", "own", "received", "sum"), (routers, own, received, sums))
            for name, leaf in group.items()
            if leaf.grad is not None
        }
        return {name: value.detach() for name, value in outputs.items()}, gradients

    def through_memory(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same by `DepthMemory`, in the order in which a stage of the model calls it."""
        routers, own, _, _ = self.leaves()
        memory = DepthMemory(
            self.transfer,
            self.own,
            self.transfer.own_blocks(self.layers),
            HEADS,
            ROW,
            dtype=torch.float64,
            sum_dtype=torch.float64,
            device=torch.device("cpu"),
        )
        for buffer, received in ((memory.entries, self.entries), (memory.sums, self.sums)):
            if received:
                buffer.load(tuple(received), torch.stack(list(received.values())))
        chain = self.add(memory, routers, memory.runs_before(), memory.start(), skip=())
        reads = {}
        for layer in self.layers:
            if layer in own:
                chain = memory.write(layer, own[layer].view(HEADS, 2, TOKENS, HEAD_DIM), chain)
            if layer in self.readers:
                sources = self.among(layer, memory.own)
                reads[layer] = memory.read(layer, self.columns(routers, layer, sources), sources, chain)
        chain = self.add(memory, routers, memory.runs_made(), chain, skip=self.readers)
        sent = self.transfer.sent
        outputs = {f"read {reader}": value.detach() for reader, value in reads.items()}
        outputs |= named("entry", sent.raw_entries, memory.entries.select(sent.raw_entries))
        outputs |= named("sum", sent.partial_sums, memory.sums.select(sent.partial_sums))
        self.back(memory, reads, chain)
        received = self.transfer.received
        gradients = {f"router {reader}": leaf.grad for reader, leaf in routers.items() if leaf.grad is not None}
        gradients |= {f"own {layer}": leaf.grad for layer, leaf in own.items() if leaf.grad is not None}
        gradients |= named("received", received.raw_entries, memory.entries.select_gradients(received.raw_entries))
        gradients |= named("sum", received.partial_sums, memory.sums.select_gradients(received.partial_sums))
        return outputs, gradients

    def back(self, memory: DepthMemory, reads: dict[int, Tensor], chain: Tensor) -> None:
        for buffer, gradients in zip((memory.entries, memory.sums), self.sent_gradients):
            if gradients:
                buffer.add_gradients(tuple(gradients), torch.stack(list(gradients.values())))
        roots, into = list(reads.values()), list(self.read_gradients.values())
        if chain.requires_grad:
            roots.append(chain)
            into.append(torch.zeros_like(chain))
        if roots:
            torch.autograd.backward(roots, into)

    def among(self, reader: int, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(source for source in self.transfer.reads[reader] if source in layers)

    def columns(self, routers: dict[int, Tensor], reader: int, sources: tuple[int, ...]) -> Tensor:
        return routers[reader][:, [self.transfer.reads[reader].index(source) for source in sources]]

    def add(
        self, memory: DepthMemory, routers: dict[int, Tensor], runs: tuple[Run, ...], chain: Tensor, skip: tuple
    ) -> Tensor:
        for run in runs:
            among = memory.layers_of(run)
            sources = {reader: self.among(reader, among) for reader in routers if reader not in skip}
            sources = {reader: found for reader, found in sources.items() if found}
            weights = {reader: self.columns(routers, reader, found) for reader, found in sources.items()}
            chain = memory.add_to_sums(weights, sources, run, chain)
        return chain


def named(kind: str, layers: tuple[int, ...], rows: Tensor) -> dict[str, Tensor]:
    return {f"{kind} {layer}": row for layer, row in zip(layers, rows, strict=True)}


# ---- buffers


def make_memory(num_layers: int) -> DepthMemory:
    layers = range(num_layers)
    transfer = plan_transfer(parse_pattern("full", num_layers), (layers,), policy="relay").chunk(0)
    kinds = {"dtype": torch.float32, "sum_dtype": torch.float32, "device": torch.device("cpu")}
    memory = DepthMemory(transfer, tuple(layers), (), HEADS, ROW, **kinds)
    memory.entries.values.copy_(torch.arange(memory.entries.values.numel()).view_as(memory.entries.values))
    return memory


def test_neighbours_are_selected_without_a_copy_and_others_in_their_order() -> None:
    entries = make_memory(5).entries
    assert entries.select((1, 2, 3)).data_ptr() == entries.values[1].data_ptr()
    assert torch.equal(entries.select((0, 2, 3)), entries.values[[0, 2, 3]])
    assert entries.select(()).shape == (0, HEADS, ROW)


def test_the_first_share_of_a_gradient_is_written_and_others_are_added() -> None:
    entries, gradients = make_memory(3).entries, torch.ones(3, HEADS, ROW)
    entries.gradients.fill_(torch.nan)
    entries.add_gradients((0, 2), gradients[:2])
    entries.add_gradients((0,), gradients[:1])
    entries.add_gradients((0, 1, 2), gradients)
    assert entries.gradients[:, 0, 0].tolist() == [3, 1, 2]


def test_a_gradient_that_lacks_a_share_or_has_one_too_many_is_refused() -> None:
    """Of three layers, two read the first, and the last is read by itself."""
    entries, gradients = make_memory(3).entries, torch.ones(1, HEADS, ROW)
    entries.add_gradients((2,), gradients)
    assert torch.equal(entries.select_gradients((2,)), gradients)
    for count in range(4):
        if count == 2:
            assert torch.equal(entries.select_gradients((0,)), 2 * gradients)
        else:
            with pytest.raises(GradientShares, match=f"{count} of 2 shares of the gradient of layer 0 have come"):
                entries.select_gradients((0,))
        entries.add_gradients((0,), gradients)


def test_shares_are_those_of_readers_here_or_later_on_the_stage_and_of_the_next_chunk() -> None:
    """Two stages with two chunks of one layer each."""
    full = plan_transfer(
        parse_pattern("full", 4), tuple(range(n, n + 1) for n in range(4)), policy="relay", num_stages=2
    )
    shares = [full.chunk(index).shares for index in range(4)]
    assert shares == [{0: 2}, {0: 2, 1: 3}, {1: 1, 2: 2}, {2: 1, 3: 1}]


def test_received_rows_land_in_their_slots() -> None:
    entries = make_memory(4).entries
    room = entries.room_for((1, 2))
    assert room.data_ptr() == entries.values[1].data_ptr(), "neighbours are received in place"
    apart = entries.room_for((0, 3)).fill_(-1)
    entries.load((0, 3), apart)
    assert [float(row.max()) < 0 for row in entries.values] == [True, False, False, True]
