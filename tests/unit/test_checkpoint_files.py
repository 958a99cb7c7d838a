"""A checkpoint's files: slices of any layout make the tensor; a missing or damaged part is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lime_dist.checkpoint.files import FORMAT, CheckpointReader, find_checkpoints, find_latest, read_meta, step_folder
from lime_dist.errors import CheckpointError
from lime_dist.lime.parameters import LogicalTensor, Role

MATRIX = LogicalTensor("layers.0.mlp.down_proj.weight", (4, 6), Role.PROJECTION)
VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)
KEY = f"weight:{MATRIX.name}"


def write_part(folder: Path, stem: str, *slices: tuple[int, int]) -> None:
    """Columns `start` to `end` of the matrix, slice by slice."""
    keys = [f"{KEY}@{start}" for start, _ in slices]
    save_file(
        {key: VALUES[:, start:end].copy() for key, (start, end) in zip(keys, slices, strict=True)},
        folder / f"{stem}.safetensors",
    )
    places = [{"dim": 1, "start": start, "shape": list(MATRIX.shape)} for start, _ in slices]
    (folder / f"{stem}.json").write_text(json.dumps(dict(zip(keys, places, strict=True))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The matrix in two files, one with two slices."""
    folder = step_folder(tmp_path, 7)
    folder.mkdir()
    write_part(folder, "a", (2, 3))
    write_part(folder, "b", (3, 6), (0, 2))
    meta = {"format": FORMAT, "step": 7, "samples_seen": 84, "config": {"run": {}}, "files": ["a", "b"]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def change(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def test_slices_make_the_tensor(folder: Path) -> None:
    reader = CheckpointReader(folder)
    values = reader.array("weight", MATRIX)
    assert values.dtype == np.float32 and np.array_equal(values, VALUES)
    assert (reader.meta.step, reader.meta.samples_seen, reader.meta.config) == (7, 84, {"run": {}})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no meta": (lambda f: (f / "meta.json").unlink(), r"no meta\.json in it; name a folder"),
    "empty meta": (lambda f: cut(f / "meta.json", 0), r"meta\.json: cut short or not JSON"),
    "cut meta": (lambda f: cut(f / "meta.json", 40), r"meta\.json: cut short or not JSON"),
    "format": (lambda f: change(f / "meta.json", "format", 99), "format 99, this version reads 1"),
    "no format": (lambda f: (f / "meta.json").write_text("{}"), "format None"),
    "meta without a step": (lambda f: (f / "meta.json").write_text('{"format": 1}'), r"meta\.json"),
    "meta is a list": (lambda f: (f / "meta.json").write_text("[]"), r"meta\.json|format"),
    "no places": (lambda f: (f / "b.json").unlink(), r"b\.json: No such file"),
    "cut places": (lambda f: cut(f / "b.json", 10), r"b\.json: cut short or not JSON"),
    "no tensors": (lambda f: (f / "b.safetensors").unlink(), r"b\.safetensors: No such file"),
    "empty tensors": (lambda f: cut(f / "b.safetensors", 0), r"b\.safetensors: "),
    "cut tensors": (lambda f: cut(f / "b.safetensors", -4), r"b\.safetensors: "),
    "no tensors but a text": (lambda f: (f / "b.safetensors").write_text("version https://"), r"b\.safetensors: "),
    "places of other tensors": (lambda f: save_file({"x": VALUES}, f / "b.safetensors"), r"b\.safetensors: .*weight:"),
    "a part is left out": (lambda f: change(f / "meta.json", "files", ["a"]), f"{KEY} is incomplete"),
    "a slice lost a column": (lambda f: write_part(f, "b", (3, 5), (0, 2)), f"{KEY} is incomplete"),
    "a slice is left out": (lambda f: write_part(f, "b", (3, 6)), f"{KEY} is incomplete"),
    "no part at all": (lambda f: change(f / "meta.json", "files", []), f"no {KEY}; it is of another model"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(folder).array("weight", MATRIX)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert re.search("; (name|use) |another model", str(caught.value)), "no mend"


def test_another_shape(folder: Path) -> None:
    wider = LogicalTensor(MATRIX.name, (4, 8), Role.PROJECTION)
    with pytest.raises(CheckpointError, match=re.escape("has shape [4, 6], the model [4, 8]; use the checkpoint's")):
        CheckpointReader(folder).array("weight", wider)


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_moments_are_not_weights(folder: Path, kind: str) -> None:
    with pytest.raises(CheckpointError, match=f"no {kind}:.* without optimiser state"):
        CheckpointReader(folder).array(kind, MATRIX)


@pytest.mark.parametrize("missing", ["", "step_000001"])
def test_no_folder(tmp_path: Path, missing: str) -> None:
    with pytest.raises(CheckpointError, match=r"no meta\.json in it"):
        read_meta(tmp_path / missing)


def test_the_newest_whole_one(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "nothing") is None and find_latest(tmp_path) is None
    for step in (2, 999_999, 1_000_000):
        (folder := step_folder(tmp_path, step)).mkdir()
        (folder / "meta.json").write_text("{}")
    step_folder(tmp_path, 2_000_000).mkdir()  # not whole
    for name in (".unfinished-step_3000000", "step_x", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
    found = [path.name for path in find_checkpoints(tmp_path)]
    assert found == ["step_000002", "step_999999", "step_1000000"]
    assert find_latest(tmp_path) == tmp_path / "step_1000000"
