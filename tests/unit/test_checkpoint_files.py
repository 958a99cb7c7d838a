"""A checkpoint's files: slices of any layout make the tensors; what is missing, damaged or crafted is named."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_stand_ins import all_tensors, sign, write_checkpoint, write_first_format
from safetensors.numpy import load_file, save_file

from lime_dist.checkpoint.checking import Origin, read_meta
from lime_dist.checkpoint.reader import CheckpointReader, find_before, find_checkpoints, find_latest, step_folder
from lime_dist.errors import CheckpointError
from lime_dist.plan.tensors import LogicalTensor, Role
from lime_dist.training.spikes import SpikeState

NAME = "layers.0.mlp.down_proj.weight"
KEY = f"weight:{NAME}"
HALVES = f"{KEY}@0", f"{KEY}@6"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the first format, in which whoever changes a file need not change a checksum."""
    write_first_format(step_folder(tmp_path, 7))
    return step_folder(tmp_path, 7)


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """Of the present format."""
    write_checkpoint(step_folder(tmp_path, 7))
    return step_folder(tmp_path, 7)


def change(path: Path, *keys: str, value: Any) -> None:
    """Set `tree[key][key]... = value`."""
    tree = node = json.loads(path.read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(tree))


def meta(*keys: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "meta.json", *keys, value=value)


def place(key: str, **values: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        for stem in "ab":
            places = json.loads((folder / f"{stem}.json").read_text())
            if key in places:
                places[key] |= values
                (folder / f"{stem}.json").write_text(json.dumps(places))

    return act


def rename_slice(old: str, new: str) -> Callable[[Path], None]:
    """In both files of its part."""

    def act(folder: Path) -> None:
        for stem in "ab":
            path = folder / f"{stem}.json"
            places, tensors = json.loads(path.read_text()), load_file(folder / f"{stem}.safetensors")
            if old in places:
                places[new], tensors[new] = places.pop(old), tensors.pop(old)
                places[new]["start"] = int(new.partition("@")[2])
                path.write_text(json.dumps(places))
                save_file(tensors, folder / f"{stem}.safetensors")

    return act


def retype(folder: Path) -> None:
    save_file(
        {k: v.astype(np.float64) for k, v in load_file(folder / "a.safetensors").items()}, folder / "a.safetensors"
    )


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


def move_away(path: Path, replace: Callable[[Path, Path], object]) -> None:
    """`replace(elsewhere, path)` after the file has gone elsewhere."""
    elsewhere = path.parent.parent / path.name
    path.rename(elsewhere)
    replace(elsewhere, path)


def link(path: Path) -> None:
    move_away(path, lambda elsewhere, path: path.symlink_to(elsewhere))


def pipe(path: Path) -> None:
    move_away(path, lambda _, path: os.mkfifo(path))


def make_folder(path: Path) -> None:
    move_away(path, lambda _, path: path.mkdir())


@pytest.mark.parametrize("write", [write_checkpoint, write_first_format])
def test_chunks_make_the_tensors(write: Callable[[Path], dict[str, np.ndarray]], tmp_path: Path) -> None:
    written = write(tmp_path / "step_000007")
    found = all_tensors(tmp_path / "step_000007")
    assert found.keys() == written.keys()
    assert all(found[key].dtype == np.float32 and np.array_equal(found[key], written[key]) for key in written)
    reader = CheckpointReader(tmp_path / "step_000007")
    assert (reader.meta.step, reader.meta.samples_seen, reader.config.run.steps) == (7, 84, 9)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no meta": (lambda f: (f / "meta.json").unlink(), r"no meta\.json in it; name a folder"),
    "empty meta": (lambda f: cut(f / "meta.json", 0), r"meta\.json: cut short or not JSON"),
    "cut meta": (lambda f: cut(f / "meta.json", 40), r"meta\.json: cut short or not JSON"),
    "brackets": (lambda f: (f / "meta.json").write_text("[" * 200_000), r"meta\.json: cut short or not JSON"),
    "format": (meta("format", value=99), "format 99, this version reads 1 and 2"),
    "format true": (meta("format", value=True), "format True, this version reads 1"),
    "no format": (lambda f: (f / "meta.json").write_text("{}"), "format None"),
    "meta without a step": (lambda f: (f / "meta.json").write_text('{"format": 1}'), r"no step in meta\.json"),
    "meta is a list": (lambda f: (f / "meta.json").write_text("[]"), r"format None"),
    "another step": (meta("step", value=8), r"step 8 in meta\.json"),
    "a step that is text": (meta("step", value="7"), r"step in meta\.json cannot be '7'"),
    "samples below 0": (meta("samples_seen", value=-1), r"samples_seen in meta\.json cannot be -1"),
    "samples without end": (meta("samples_seen", value=10**40), r"samples_seen in meta\.json cannot be 10"),
    "spikes are a list": (meta("spikes", value=[]), r"spikes in meta\.json cannot be \[\]"),
    "spikes of another kind": (meta("spikes", value={"x": 1}), r"spikes in meta\.json cannot be \{'x': 1\}"),
    "losses are a text": (meta("spikes", value={"losses": "x"}), r"spikes\.losses in meta\.json cannot be 'x'"),
    "a loss that is not finite": (meta("spikes", value={"losses": [math.nan]}), r"spikes\.losses .* cannot be \[nan\]"),
    "a loss without end": (meta("spikes", value={"losses": [1e300]}), r"spikes\.losses .* cannot be \[1e\+300\]"),
    "a norm that is true": (meta("spikes", value={"grad_norms": [True]}), r"spikes\.grad_norms .* cannot be \[True\]"),
    "losses without end": (meta("spikes", value={"losses": [0.5] * 10_001}), r"spikes\.losses .* cannot be \[0\.5"),
    "bad steps that go back": (meta("spikes", value={"bad_steps": [5, 4]}), r"spikes\.bad_steps .* cannot be \[5, 4\]"),
    "a bad step to come": (meta("spikes", value={"bad_steps": [8]}), r"spikes in meta\.json cannot be .* at step 7"),
    "more skipped than made": (
        meta("spikes", value={"num_skipped": 8}),
        r"spikes in meta\.json cannot be .* at step 7",
    ),
    "returns below 0": (meta("spikes", value={"num_returns": -1}), r"spikes\.num_returns in meta\.json cannot be -1"),
    "more passed over than seen": (meta("spikes", value={"samples_passed_over": 85}), r"spikes .* at step 7"),
    "config is a list": (meta("config", value=[]), r"config in meta\.json cannot be \[\]"),
    "config without a model": (meta("config", value={}), r"config in meta\.json: model: missing"),
    "config of another": (
        meta("config", "model", "hidden_size", value=7),
        r"config in meta\.json: model\.hidden_size: 7",
    ),
    "a pattern": (meta("config", "depth", "pattern", value="x"), r"config in meta\.json: depth\.pattern: 'x'"),
    "a million layers": (meta("config", "model", "num_layers", value=10**6), r"3 layers .*num_layers=1000000 in its"),
    "vocabulary": (
        meta("config", "model", "vocab_size", value=16_000_000),
        r"has shape .* its config says \[16000000",
    ),
    "a name outside": (meta("files", value=["../other/a", "b"]), r"files in meta\.json cannot be \['\.\./other/a'"),
    "an absolute name": (meta("files", value=["/etc/a", "b"]), r"files in meta\.json cannot be"),
    "a name twice": (meta("files", value=["a", "a", "b"]), r"files in meta\.json cannot be"),
    "a name and a line": (meta("files", value=["a\n", "b"]), r"files in meta\.json cannot be"),
    "names are a text": (meta("files", value="ab"), r"files in meta\.json cannot be 'ab'"),
    "no places": (lambda f: (f / "b.json").unlink(), r"b\.json: No such file"),
    "cut places": (lambda f: cut(f / "b.json", 10), r"b\.json: cut short or not JSON"),
    "places are a list": (lambda f: (f / "b.json").write_text("[]"), r"b\.json: no mapping"),
    "no tensors": (lambda f: (f / "b.safetensors").unlink(), r"b\.safetensors: No such file"),
    "empty tensors": (lambda f: cut(f / "b.safetensors", 0), r"b\.safetensors: "),
    "cut tensors": (lambda f: cut(f / "b.safetensors", -4), r"b\.safetensors: "),
    "no tensors but a text": (lambda f: (f / "b.safetensors").write_text("version https://"), r"b\.safetensors: "),
    "other tensors": (lambda f: save_file({"x": np.zeros(9999)}, f / "b.safetensors"), r"b\.safetensors: .*weight:"),
    "tensors of doubles": (retype, r"a\.safetensors: .* is F64 \[.*, not F32"),
    "a part is left out": (meta("files", value=["a"]), "is incomplete, or its chunks overlap|cut short"),
    "no part at all": (meta("files", value=[]), "0 layers in its files"),
    "a slice overlaps": (rename_slice(HALVES[1], f"{KEY}@5"), rf"{KEY}@. is F32 \[8, 6\], not F32 \[8, [57]\]"),
    "a slice twice": (rename_slice(HALVES[1], f"{KEY}@00"), f"{KEY} is incomplete, or its chunks overlap"),
    "a slice behind the end": (rename_slice(HALVES[1], f"{KEY}@12"), f"{KEY}@12 cannot be at"),
    "a tensor of another model": (rename_slice(HALVES[1], "weight:x@0"), "'weight:x@0' is no tensor of the model"),
    "another start": (place(HALVES[1], start=5), f"{KEY}@6 cannot be at"),
    "a start that is text": (place(HALVES[1], start="6"), f"{KEY}@6 cannot be at"),
    "another dim": (place(HALVES[1], dim=0), rf"{KEY}@0 is F32 \[8, 6\], not F32 \[6, 12\]"),
    "dim too large": (place(HALVES[1], dim=2), f"{KEY}@6 cannot be at"),
    "dim below 0": (place(HALVES[1], dim=-1), f"{KEY}@6 cannot be at"),
    "another shape": (place(HALVES[1], shape=[8, 10**12]), f"{KEY}@6 has shape"),
    "no shape": (place(HALVES[1], shape=None), f"{KEY}@6 has shape None"),
    **{
        f"{kind.__name__} in place of {name}": (lambda f, kind=kind, name=name: kind(f / name), "no regular file")
        for kind in (link, pipe, make_folder)
        for name in ("meta.json", "b.json", "b.safetensors")
    },
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(folder: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        all_tensors(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert re.search("; (name|use) |another model", str(caught.value)), "no fix"


def test_nothing_of_a_crafted_size_is_made(folder: Path) -> None:
    """Sizes that agree with one another, and with no file: refused before anything is allocated."""
    rows = 2**24
    change(folder / "meta.json", "config", "model", "vocab_size", value=rows)
    for stem in "ab":
        places = json.loads((folder / f"{stem}.json").read_text())
        for key, where in places.items():
            if ":embed_tokens" in key:
                where["shape"] = [rows, 8]
        (folder / f"{stem}.json").write_text(json.dumps(places))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        CheckpointError, match=r"safetensors: cut short, or a chunk is missing: its tensors have \d{9,}"
    ):
        CheckpointReader(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_spikes_of_an_older_checkpoint_and_of_this_one(folder: Path) -> None:
    assert read_meta(folder).spikes == SpikeState() and read_meta(folder).num_updates == 7, "it says nothing of them"
    state = SpikeState(
        losses=(0.1, 1 / 3), grad_norms=(2.0,), bad_steps=(5, 7), num_skipped=3, num_returns=2, samples_passed_over=24
    )
    change(folder / "meta.json", "spikes", value=asdict(state))
    assert read_meta(folder).spikes == state and read_meta(folder).num_updates == 4


@pytest.mark.parametrize(
    "origin", ([], {"versions": [1]}, {"versions": {"torch": 2}}, {"tokenizer": "abc"}, {"more": "x"}, "x")
)
def test_what_it_came_from(origin: Any, folder: Path) -> None:
    assert read_meta(folder).origin == Origin(), "an older one says nothing of it"
    change(folder / "meta.json", "origin", value={"versions": {"torch": "2.13.0"}, "tokenizer": "0" * 64})
    assert read_meta(folder).origin == Origin({"torch": "2.13.0"}, "0" * 64)
    change(folder / "meta.json", "origin", value=origin)
    with pytest.raises(CheckpointError, match=r"origin[\w.]* in meta.json cannot be"):
        read_meta(folder)


def test_the_newest_one_of_before_a_step(tmp_path: Path) -> None:
    for step in (4, 8, 10, 12):
        write_checkpoint(step_folder(tmp_path, step), step=step)
    (step_folder(tmp_path, 10) / "meta.json").write_text("{}")  # damaged
    assert [find_before(tmp_path, step) and find_before(tmp_path, step).name for step in (4, 5, 8, 9, 11, 99)] == [
        None, "step_000004", "step_000004", "step_000008", "step_000008", "step_000012",
    ]  # fmt: skip


def test_a_key_that_has_another_name_now(folder: Path) -> None:
    tree = json.loads((folder / "meta.json").read_text())
    optim = tree["config"].setdefault("optim", {})
    optim.pop("min_lr", None)
    optim["min_lr_ratio"] = 0.25
    (folder / "meta.json").write_text(json.dumps(tree))
    assert CheckpointReader(folder).config.optim.min_lr == 0.25


def test_another_shape(folder: Path) -> None:
    wider = LogicalTensor(NAME, (8, 14), Role.PROJECTION)
    with pytest.raises(CheckpointError, match=re.escape("has shape [8, 12], the model [8, 14]; use the checkpoint's")):
        CheckpointReader(folder).array("weight", wider)


@pytest.mark.parametrize("kind", ["exp_avg", "exp_avg_sq"])
def test_moments_may_be_missing_and_are_not_weights(folder: Path, kind: str) -> None:
    for stem in "ab":
        path = folder / f"{stem}.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k.startswith("weight:")}))
    reader = CheckpointReader(folder)
    assert reader.array("weight", LogicalTensor(NAME, (8, 12), Role.PROJECTION)).shape == (8, 12)
    with pytest.raises(CheckpointError, match=f"no {kind}:.* without optimiser state"):
        reader.array(kind, LogicalTensor(NAME, (8, 12), Role.PROJECTION))


@pytest.mark.parametrize("missing", ["", "step_000001"])
def test_no_folder(tmp_path: Path, missing: str) -> None:
    with pytest.raises(CheckpointError, match=r"no meta\.json in it"):
        read_meta(tmp_path / missing)


def test_a_checkpoint_may_have_another_name_or_be_reached_by_a_link(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "best")
    (tmp_path / "linked").symlink_to(tmp_path / "best")
    assert read_meta(tmp_path / "best").step == read_meta(tmp_path / "linked").step == 7


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


def test_whoever_may_read_one_file_may_read_all(signed: Path) -> None:
    assert len({path.stat().st_mode for path in signed.iterdir()}) == 1


# ---- checksums


def test_any_other_byte_is_found(signed: Path) -> None:
    """In each file: bytes everywhere, those of a header's padding aside, which mean nothing."""
    for name in ("meta.json", "a.json", "b.json", "a.safetensors", "b.safetensors"):
        path = signed / name
        content = path.read_bytes()
        for at in range(0, len(content), max(1, len(content) // 150)):
            changed = bytearray(content)
            changed[at] ^= 1 << at % 7
            path.write_bytes(changed)
            with pytest.raises(CheckpointError) as caught:
                all_tensors(signed)
            assert str(signed) in str(caught.value) and "\n" not in str(caught.value)
        path.write_bytes(content)
    all_tensors(signed)


def test_a_tensor_of_another_checkpoint_is_found(signed: Path, tmp_path: Path) -> None:
    write_checkpoint(step_folder(tmp_path / "other", 8), step=8)
    shutil.copy(step_folder(tmp_path / "other", 8) / "a.safetensors", signed)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .* is damaged: its checksum is another; name another"):
        all_tensors(signed)


CRAFTED = {
    "overlap": ({"sizes": [8, 7]}, f"{KEY} is incomplete, or its chunks overlap|cannot be"),
    "gap": ({"sizes": [8, 5]}, f"{KEY} is incomplete, or its chunks overlap"),
    "outside": ({"sizes": [9, 6]}, f"{KEY}@0,6 cannot be at|{KEY}@0,6 cannot be"),
    "empty": ({"sizes": [8, 0]}, f"{KEY}@0,6 cannot be"),
    "another rank": ({"sizes": [8, 6, 1]}, f"{KEY}@0,6 cannot be"),
    "a text": ({"sizes": "86"}, f"{KEY}@0,6 cannot be"),
    "no checksum": ({"sha256": None}, f"{KEY}@0,6 cannot be"),
    "a short checksum": ({"sha256": "00"}, f"{KEY}@0,6 cannot be"),
    "another checksum": ({"sha256": "0" * 64}, f"{KEY}@0,6 is damaged"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_indexes(signed: Path, name: str) -> None:
    values, message = CRAFTED[name]
    place(f"{KEY}@0,6", **values)(signed)
    sign(signed)
    with pytest.raises(CheckpointError, match=message):
        all_tensors(signed)
