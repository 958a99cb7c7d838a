"""What a run of three stages says at its start, once, and what it leaves of it on TensorBoard and in Weights & Biases."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.cli.command_line import main
from lime_dist.config import load_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.plan.parameters import total_parameters
from lime_dist.training.wandb_board import _new_id, _run_id, is_installed

BASE = {
    "model": {"num_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 3},
    "data": {"train": "train", "seq_length": 12, "global_batch_size": 6},
    "checkpoint": {"every": 2, "keep": 9},
    "run": {"device": "cpu", "steps": 4, "timeout_seconds": 60},
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("messages")
    with IndexedWriter(folder / "train", vocab_size=96) as writer:
        writer.add_document(np.arange(1201) % 96)
        writer.commit({"vocab_size": 96, "tokens": 1201})
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    os.chdir(folder)
    return folder


def train(run_dir: Path, *more: str) -> int:
    return main(["train", "run.yaml", f"run.dir={run_dir}", *more])


def test_a_run_says_once_how_large_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And warns once, though three ranks find the reason."""
    assert train(tmp_path, "optim.warmup_steps=50") == 0
    out, errors = capfd.readouterr()
    config = load_config(tmp_path / "config.yaml")
    routers = 4 * 4 * (2 + 3)
    assert out.splitlines()[:2] == [
        f"{total_parameters(config.model, config.pattern):,} parameters, {routers} of them in routers; training text of 1.2k tokens",
        "72 tokens a step, 288 in 4 steps: 0.24 epochs",
    ]
    assert out.count("parameters") == 1 and errors.count("warning: ") == errors.count("the whole run is warm-up") == 1
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = board.Tensors("config/text_summary")
    assert "    run:\n" in text.tensor_proto.string_val[0].decode() and text.step == 0
    assert [point.step for point in board.Scalars("train/router_lr")] == [1, 2, 3, 4]
    assert all(point.value > 50 * 2**20 for point in board.Scalars("train/peak_resident_bytes"))


def test_a_key_without_the_package(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name, which the library leaves where it is used, is no package."""
    Path("wandb").mkdir()
    if is_installed():
        monkeypatch.setattr("lime_dist.training.wandb_board.is_installed", lambda: False)
    assert train(tmp_path / "run", "wandb.project=trials") == 2
    _, errors = capfd.readouterr()
    assert errors == (
        "lime-dist: wandb.project: needs the wandb library; pip install 'lime_dist[wandb]', or leave the key out\n"
    )
    assert not (tmp_path / "run").exists()


with_wandb = pytest.mark.skipif(not is_installed(), reason="wandb is not installed (extra wandb)")


@with_wandb
def test_wandb_has_what_tensorboard_has(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept for later, as without a network; a run that goes on has the same name there."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("lime_dist.training.wandb_board.CLOSE_SECONDS", 120)  # ranks are forks
    words = ("wandb.project=trials", "wandb.name=first", "analysis.every=2")
    assert train(tmp_path, *words, "run.steps=2", "optim.warmup_steps=0") == 0
    assert train(tmp_path, *words, "optim.warmup_steps=0") == 0
    assert "wandb: " not in "".join(capfd.readouterr())
    (run_id,) = {begun_run(path).run_id for path in wandb_files(tmp_path)}
    assert run_id == (tmp_path / "wandb_id").read_text().split()[0]
    assert [(begun_run(path).project, begun_run(path).display_name) for path in wandb_files(tmp_path)] == [
        ("trials", "first")
    ] * 2
    found = [row for path in wandb_files(tmp_path) for row in rows(path)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in board.Tags()["scalars"]:
        kept = [(row["step"], row[name]) for row in found if name in row]
        assert kept == [(point.step, pytest.approx(point.value)) for point in board.Scalars(name)], name
    for name in ("routers/mean", "config"):
        assert sum(name in row for row in found) == 2, name


def test_a_copy_of_a_run_is_another_one_in_wandb(tmp_path: Path) -> None:
    run, copy, moved = tmp_path / "run", tmp_path / "copy", tmp_path / "moved"
    run.mkdir()
    first = _new_id(run)
    assert _run_id(run) == first
    shutil.copytree(run, copy)
    other = _run_id(copy)
    assert other != first and _run_id(copy) == other and _run_id(run) == first
    run.rename(moved)
    assert _run_id(moved) == first


@with_wandb
def test_wandb_that_cannot_be_reached_costs_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lime_dist.training.wandb_board.CLOSE_SECONDS", 1)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nothing listens
    assert train(tmp_path, "wandb.project=trials", "optim.warmup_steps=0") == 0
    _, errors = capfd.readouterr()
    assert "Traceback" not in errors
    assert sum(line.startswith("lime-dist: warning: wandb: ") for line in errors.splitlines()) == 1


def wandb_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def records(path: Path) -> list:
    """What the run's file holds, which `wandb sync` would send: after a header of 7 bytes LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(data) for data in logged(path.read_bytes())]


FULL, LAST = 1, 4  # kinds of fragments that end a record
BLOCK = 2**15  # no header of a fragment lies across two


def logged(data: bytes) -> Iterator[bytes]:
    place, parts = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def begun_run(path: Path):
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")


def rows(path: Path) -> list[dict]:
    """Of what has parts, as pictures do, their names count here."""
    return [
        {
            item.key or item.nested_key[0]: json.loads(item.value_json) if len(item.nested_key) < 2 else ...
            for item in record.history.item
        }
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]
