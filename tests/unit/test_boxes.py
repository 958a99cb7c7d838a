"""Boxes of elements against marking each element of small arrays."""

from __future__ import annotations

import random
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
