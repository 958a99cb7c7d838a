"""What is packed comes back as it was, and what nobody packed is refused without being run."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lime_dist.config import Config, DataConfig, DepthConfig, ModelConfig, Source
from lime_dist.lifecycle.wire import _LENGTH, find, name_of, pack, unpack


@dataclass(frozen=True)
class Inner:
    values: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: list[Inner] = field(default_factory=list)


PLAIN = [
    None, True, 0, -(2**70), 1e-300, "ä\n\ud800", [], (), {}, [1, [2, (3, [])]], (1, ("tuple", ["list"])), ["tensor", 0],
    {1: "a", "1": "b", None: (1, 2), (1, 2): {"x": [0.1]}}, Path("/a/b"), Outer(name="x", inner=[Inner((1, 2)), Inner(())]),
    Config(
        model=ModelConfig(num_layers=3, hidden_size=8, intermediate_size=8, num_heads=1, vocab_size=8),
        depth=DepthConfig(pattern={2: [0, 1]}),
        data=DataConfig(train=[Source(path="a", weight=0.3)]),
        deepspeed={"zero_optimization": {"stage": 1}},
    ),
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    assert repr(unpack(pack(value))) == repr(value) and unpack(pack(value)) == value


def test_numbers_that_are_not_finite() -> None:
    found = unpack(pack([math.inf, -math.inf, math.nan]))
    assert found[:2] == [math.inf, -math.inf] and math.isnan(found[2])


TENSORS = [
    torch.arange(6).reshape(2, 3).t(), torch.tensor(1.5), torch.zeros(0, 4), torch.tensor([True, False]),
    torch.tensor([1.5, math.nan, -0.0], dtype=torch.bfloat16), torch.ones(3, dtype=torch.float64, requires_grad=True),
]  # fmt: skip


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and repr(a) == repr(b)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}")
def test_tensors_come_back_as_they_were(tensor: Tensor) -> None:
    assert same(unpack(pack(tensor)), tensor.detach())


def test_tensors_within_others_and_parts_of_one_storage() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    many = {"rows": [(index, row) for index, row in enumerate(whole)], "again": (whole, whole), "none": torch.zeros(0)}
    found = unpack(pack(many))
    assert [(index, row.tolist()) for index, row in found["rows"]] == list(enumerate(whole.tolist()))
    assert all(torch.equal(tensor, whole) for tensor in found["again"])
    found["again"][0][0, 0] = 7.0
    assert found["again"][1][0, 0] == 0.0 and unpack(pack(list(whole)))[11 % 3].shape == (4,)


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), print, Outer, 1j], ids=repr)
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be sent to another process"):
        pack([value])


def crafted(tree: object) -> bytes:
    text = json.dumps(tree).encode()
    return _LENGTH.pack(len(text)) + text


@pytest.mark.parametrize(
    "tree",
    [
        ["dataclass", "os:system", ["dict", ["command", "touch proof"]]],
        ["dataclass", "subprocess:Popen", ["dict", ["args", "touch proof"]]],
        ["dataclass", "not_imported:Thing", ["dict"]],
        ["call", "os:system", "touch proof"],
        [["list"], 1],
    ],
    ids=str,
)
def test_nothing_that_the_sender_names_is_run(tree: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError)):
        unpack(crafted(tree))
    assert not list(tmp_path.iterdir())


def test_names() -> None:
    assert name_of(Inner) == f"{__name__}:Inner" and find(name_of(Inner)) is Inner
    for unnamed in (lambda: None, type("Inner", (), {"__module__": __name__})):
        with pytest.raises(ValueError):
            name_of(unnamed)
