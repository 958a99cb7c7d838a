"""Boxes of elements against marking each element of small arrays."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from math import prod

import numpy as np
import pytest

from lime_dist.checkpoint.boxes import Box, Part, common, cut_into_chunks, parts_of, range_boxes
from lime_dist.config import check_config, parse_config
from lime_dist.plan.parameters import logical_tensors, padded_vocab_size, plan_parameters
from lime_dist.plan.tensors import LogicalTensor, Role
from lime_dist.plan.transfer import plan_transfer

TREE = {
    "model": {
        "num_layers": 4,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_heads": 4,
        "num_kv_heads": 2,
        "vocab_size": 70,
    },
    "run": {"steps": 1},
}


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (5, 1), (3, 2, 4), (2, 3, 2, 2)])
def test_boxes_of_a_range_hold_its_elements_once_and_in_order(shape: tuple[int, ...]) -> None:
    size = prod(shape)
    numbers = np.arange(size).reshape(shape)
    for start, stop in product(range(size + 1), repeat=2):
        boxes = list(range_boxes(shape, start, stop))
        found = [number for box in boxes for number in numbers[box.slices()].ravel()]
        assert found == list(range(start, stop))
        assert len(boxes) <= 2 * len(shape) - 1


def test_what_two_boxes_have_in_common() -> None:
    draw = random.Random(1)
    for _ in range(300):
        left, right = (
            Box(tuple(draw.randrange(4) for _ in range(3)), tuple(draw.randrange(1, 4) for _ in range(3)))
            for _ in range(2)
        )
        marked = np.zeros((8, 8, 8), int)
        for box in (left, right):
            marked[box.slices()] += 1
        both = common(left, right)
        assert (marked == 2).sum() == (both.num_elements if both else 0)
        if both:
            assert (marked[both.slices()] == 2).all()
            assert np.array_equal(marked[left.slices()][both.within(left)], marked[both.slices()])


@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("pp", (1, 3))
@pytest.mark.parametrize("replicas", (1, 3))
def test_the_shares_of_all_ranks_make_every_tensor_once(tp: int, pp: int, replicas: int) -> None:
    config = check_config(parse_config(TREE))
    chunks = [range(4)] if pp == 1 else [range(0, 1), range(1, 3), range(3, 4)]
    transfer = plan_transfer(config.pattern, tuple(chunks), policy="least")
    numbers = {
        name: np.arange(prod(tensor.shape)).reshape(tensor.shape)
        for name, tensor in logical_tensors(config.model, config.pattern).items()
    }
    seen = {name: np.zeros(values.shape, int) for name, values in numbers.items()}
    for index, tp_rank in product(range(len(chunks)), range(tp)):
        specs = plan_parameters(
            config.model,
            transfer.chunk(index),
            chunks[index],
            tp=tp,
            tp_rank=tp_rank,
            vocab_rows=padded_vocab_size(70, tp),
        )
        for spec in specs:
            if spec.tied_copy or (tp_rank and not spec.sharded):
                continue
            values = np.full(spec.shape, -1)
            for piece in spec.pieces:
                place = [slice(None)] * len(spec.shape)
                place[piece.dim] = slice(piece.local_start, piece.local_start + piece.length)
                values[tuple(place)] = numbers[piece.tensor.name].take(
                    range(piece.start, piece.start + piece.length), piece.dim
                )
            size = prod(spec.shape)
            for replica in range(replicas):
                for part in parts_of(spec, size * replica // replicas, size * (replica + 1) // replicas):
                    for chunk in cut_into_chunks(part):
                        name = chunk.tensor.name
                        assert np.array_equal(values[chunk.local.slices()], numbers[name][chunk.logical.slices()])
                        seen[name][chunk.logical.slices()] += 1
    for name, times in seen.items():
        assert (times == 1).all(), name


def test_chunks_are_small_and_at_the_same_places_from_any_part() -> None:
    tensor = LogicalTensor("down", (2048, 5504), Role.PROJECTION)
    corners = set()
    for tp in (1, 4, 16):
        width = 5504 // tp
        for rank in range(tp):
            part = Box((0, rank * width), (2048, width))
            chunks = list(cut_into_chunks(Part(tensor, 1, part, Box((0, 0), part.sizes))))
            assert all(chunk.logical.num_elements * 4 <= 2**20 for chunk in chunks)
            corners |= {(tp, chunk.logical) for chunk in chunks}
    by_layout = [{box for found, box in corners if found == tp} for tp in (1, 4, 16)]
    assert by_layout[0] == by_layout[1] == by_layout[2]


# ---- what ranks of one layout read of what ranks of another wrote

LARGE = {
    "model": {
        "num_layers": 4, "hidden_size": 2048, "intermediate_size": 5632, "num_heads": 16, "num_kv_heads": 8, "vocab_size": 50000,
    },
    "run": {"steps": 1},
}  # fmt: skip
LAYOUTS = [(1, 1, 1), (4, 1, 1), (1, 4, 2), (2, 2, 3), (8, 1, 5), (2, 4, 8)]  # tp, pp, dp under ZeRO


def shares(tp: int, pp: int, dp: int, writes: bool) -> Iterator[list[Part]]:
    """What each rank has, or writes: its replica's part of all its stage's parameters, one behind the other."""
    config = check_config(parse_config(LARGE))
    layers = tuple(range(stage * 4 // pp, (stage + 1) * 4 // pp) for stage in range(pp))
    transfer = plan_transfer(config.pattern, layers, policy="least")
    rows = padded_vocab_size(config.model.vocab_size, tp)
    for stage, tp_rank, replica in product(range(pp), range(tp), range(dp)):
        specs = plan_parameters(
            config.model, transfer.chunk(stage), layers[stage], tp=tp, tp_rank=tp_rank, vocab_rows=rows
        )
        total = sum(prod(spec.shape) for spec in specs)
        first, last, begin = total * replica // dp, total * (replica + 1) // dp, 0
        share: list[Part] = []
        for spec in specs:
            size = prod(spec.shape)
            if not writes or (not spec.tied_copy and (spec.sharded or tp_rank == 0)):
                share += parts_of(spec, min(max(first - begin, 0), size), min(max(last - begin, 0), size))
            begin += size
        yield share


@pytest.mark.parametrize("writer", LAYOUTS)
@pytest.mark.parametrize("reader", LAYOUTS)
def test_a_rank_reads_little_more_than_its_share(writer: tuple[int, int, int], reader: tuple[int, int, int]) -> None:
    written: dict[str, set[Box]] = {}
    for share in shares(*writer, writes=True):
        for part in share:
            written.setdefault(part.tensor.name, set()).update(chunk.logical for chunk in cut_into_chunks(part))
    for share in shares(*reader, writes=False):
        wanted = sum(part.logical.num_elements for part in share)
        met = {
            (part.tensor.name, box) for part in share for box in written[part.tensor.name] if common(box, part.logical)
        }
        assert sum(box.num_elements for _, box in met) <= 1.1 * wanted
