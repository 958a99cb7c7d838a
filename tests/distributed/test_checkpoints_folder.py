"""What a user may find, or put, where checkpoints go: other files, links, a disk that is full, crafted checkpoints."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import yaml

import lime_dist.training.run  # noqa: F401  (what DeepSpeed prints at its first import must not be taken for our output)
from lime_dist.checkpoint.checking import meta_text
from lime_dist.checkpoint.reader import find_checkpoints, find_latest
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter

CONFIG = {
    "model": {"num_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96},
    "parallel": {"pp": 2},
    "data": {"train": "train", "valid": "train", "seq_length": 8, "global_batch_size": 2},
    "optim": {"warmup_steps": 0},
    "eval": {"batches": 1},
    "checkpoint": {"every": 1},
    "run": {"dir": "run", "steps": 2, "device": "cpu", "timeout_seconds": 60},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with IndexedWriter(tmp_path / "train", vocab_size=96) as writer:
        writer.add_document(np.arange(2000) % 96)
        writer.commit({"vocab_size": 96, "tokens": 2000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*overrides: str) -> int:
    return main(["train", "run.yaml", *overrides])


def names(path: str = "run/checkpoints") -> set[str]:
    return {found.name for found in Path(path).iterdir()}


def a_file(path: Path) -> None:
    path.write_text("a note")


def a_link_to_nowhere(path: Path) -> None:
    path.symlink_to("nowhere")


def a_link_to_a_file(path: Path) -> None:
    path.symlink_to(Path("run.yaml").absolute())


def a_link_to_a_folder(path: Path) -> None:
    Path("elsewhere").mkdir(exist_ok=True)
    Path("elsewhere/kept").touch()
    path.symlink_to(Path("elsewhere").absolute())


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "kept").touch()


THINGS = (a_file, a_link_to_nowhere, a_link_to_a_file, a_link_to_a_folder, a_folder)


@pytest.mark.parametrize("thing", THINGS[:3])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_no_folder_is_refused_before_ranks_start(
    thing: Callable[[Path], None], resume: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("run").mkdir()
    thing(Path("run/checkpoints"))
    assert train(f"checkpoint.resume={resume}") == 2
    (line,) = capfd.readouterr().err.splitlines()
    what = "a file" if thing is a_file else "a link that leads to no folder"
    assert line == f"lime-dist: checkpoint run/checkpoints: is {what}; remove it or name another run.dir"


def test_a_link_to_other_storage_holds_the_checkpoints() -> None:
    Path("run").mkdir()
    a_link_to_a_folder(Path("run/checkpoints"))
    assert train() == 0
    assert names("elsewhere") == {"kept", "step_000001", "step_000002"}
    assert train("run.steps=3") == 0
    assert names("elsewhere") == {"kept", "step_000002", "step_000003"}


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize(
    "name",
    [".unfinished-x", ".unfinished-step_000002", ".unfinished-old-step_000001", ".replaced-step_000002", "step_000003"],
)
def test_strays_do_not_stop_saves(thing: Callable[[Path], None], name: str) -> None:
    """What bears one of our own names makes room, links without what they lead to; anything else stays."""
    Path("run/checkpoints").mkdir(parents=True)
    thing(Path("run/checkpoints") / name)
    assert train("run.steps=3") == 0
    assert {path.name for path in find_checkpoints(Path("run/checkpoints"))} == {"step_000002", "step_000003"}
    assert names() - {"step_000002", "step_000003"} == ({name} if name == ".unfinished-x" else set())
    assert thing is not a_link_to_a_folder or Path("elsewhere/kept").exists()


def test_a_link_among_the_checkpoints_goes_and_what_it_leads_to_stays() -> None:
    assert train() == 0
    Path("run/checkpoints/step_000001").rename("first")
    Path("run/checkpoints/step_000001").symlink_to(Path("first").absolute())
    assert train("run.steps=3") == 0
    assert names() == {"step_000002", "step_000003"}
    assert Path("first/meta.json").exists()


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own with a MiB."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, leave_bytes: int) -> None:
    free = os.statvfs(disk)
    with suppress(OSError):  # a run that writes beside this has taken some of it
        (disk / f"filler{time.time_ns()}").write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - leave_bytes)))


def empty(disk: Path) -> None:
    for filler in disk.glob("filler*"):
        filler.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize(("leave_bytes", "what"), [(100_000, "checkpoint {run}/checkpoints"), (0, "run.dir: {run}")])
def test_a_full_disk(leave_bytes: int, what: str, small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Under a checkpoint, and under all else that a run writes. With room it goes on where it was."""
    run = f"run.dir={small_disk}/run"
    assert train(run, "run.steps=1") == 0
    fill(small_disk, leave_bytes)
    capfd.readouterr()
    assert train(run) == 2
    *others, line = capfd.readouterr().err.splitlines()
    assert all(other.startswith(("starting ", "lime-dist: ")) for other in others), "a stack trace"
    assert line.startswith(
        f"lime-dist: {what.format(run=f'{small_disk}/run')}: No space left on device; free space or "
    )
    assert line.endswith("(the last whole checkpoint is step_000001)")
    assert names(f"{small_disk}/run/checkpoints") == {"step_000001"}
    empty(small_disk)
    assert train(run) == 0
    assert names(f"{small_disk}/run/checkpoints") == {"step_000001", "step_000002"}


@contextmanager
def logged(log: Path, *overrides: str) -> Iterator[multiprocessing.Process]:
    """A run whose output goes to `log`; none of it outlives the block."""

    def command() -> None:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)  # past pytest's own
        os._exit(train(*overrides))

    log.touch()
    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("behind", ["false", "true"])
def test_a_run_goes_on_without_saving_where_it_is_told_to(behind: str, small_disk: Path) -> None:
    run, log, saved = f"run.dir={small_disk}/run", small_disk.with_name("log"), Path(f"{small_disk}/run/checkpoints")
    asked = ("checkpoint.on_full_disk=go_on", f"checkpoint.asynchronous={behind}", "run.steps=100000")
    told = "lime-dist: warning: not saved: No space left on device; the run goes on from step "
    with logged(log, run, *asked) as process:
        wait_for(lambda: find_latest(saved) is not None)
        wait_for(lambda: fill(small_disk, 0) or log.read_text().count(told) > 2)
        last = find_latest(saved)
        empty(small_disk)
        wait_for(lambda: find_latest(saved) != last)
        os.kill(process.pid, signal.SIGTERM)
        process.join()
        assert process.exitcode == 75
    assert not re.search(r"^(Traceback|  File)", log.read_text(), re.MULTILINE)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_the_last_save_cannot_be_left_out(small_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = f"run.dir={small_disk}/run"
    assert train(run, "run.steps=1") == 0
    fill(small_disk, 100_000)
    capfd.readouterr()
    assert train(run, "checkpoint.on_full_disk=go_on") == 2
    assert capfd.readouterr().err.splitlines()[-1].endswith("(the last whole checkpoint is step_000001)")


# ---- runs that go on otherwise


def test_a_changed_run_is_refused_or_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    capfd.readouterr()
    assert train("run.steps=3", "run.seed=5") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "lime-dist: run.seed: 5, but the run of checkpoint run/checkpoints/step_000002 has 0; set that, or "
    )
    assert train("run.steps=1") == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("lime-dist: run.steps: 1, but checkpoint run/checkpoints/step_000002 has 2 steps done")
    assert train("run.steps=3", "run.seed=5", "optim.lr=0.01", "checkpoint.allow_changes=[run.seed]") == 0
    assert "changed since then: run.seed 0 -> 5, optim.lr 0.001 -> 0.01, run.steps 2 -> 3\n" in capfd.readouterr().out
    assert train("run.steps=3", "run.seed=5", "optim.lr=0.01") == 0
    assert "changed since" not in capfd.readouterr().out


# ---- damaged checkpoints, where the run goes on by itself


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


STEM = "pp01-tp00-dp000"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of a tensor": lambda folder: flip(folder / f"{STEM}.safetensors", -3),
    "a bit of an index": lambda folder: flip(folder / f"{STEM}.json", 100),
    "a bit of meta.json": lambda folder: flip(folder / "meta.json", 100),
    "a file that is missing": lambda folder: (folder / f"{STEM}.safetensors").unlink(),
    "a file that is cut short": lambda folder: os.truncate(folder / f"{STEM}.safetensors", 1000),
    "a file of the step before": lambda folder: shutil.copy(
        folder.with_name("step_000001") / f"{STEM}.safetensors", folder
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_set_aside_and_the_run_goes_on_from_the_one_before(
    damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run.steps=3", "checkpoint.keep=9", "run.dir=whole") == 0
    assert train("run.steps=2", "checkpoint.keep=9") == 0
    DAMAGES[damage](Path("run/checkpoints/step_000002"))
    capfd.readouterr()
    assert train("run.steps=3", "checkpoint.keep=9") == 0
    told = capfd.readouterr()
    assert "resumed from run/checkpoints/step_000001, step 1 of 3" in told.out
    (line,) = [line for line in told.err.splitlines() if "warning" in line]
    assert line.startswith("lime-dist: warning: checkpoint run/checkpoints/step_000002"), line
    assert re.search(r"; it is damaged-\d+-step_000002 now$", line), line
    assert {name.split("-")[0] for name in names()} == {"step_000001", "step_000002", "step_000003", "damaged"}
    losses = [
        {record["step"]: record["loss"] for record in map(json.loads, open(f"{run}/metrics.jsonl")) if "loss" in record}
        for run in ("run", "whole")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_with_no_whole_checkpoint_left_does_not_begin_anew(
    damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train("run.steps=2", "checkpoint.keep=1") == 0
    folder = Path("run/checkpoints/step_000002")
    if damage == "a file of the step before":
        assert train("run.steps=1", "run.dir=other") == 0
        shutil.copy(f"other/checkpoints/step_000001/{STEM}.safetensors", folder)
    else:
        DAMAGES[damage](folder)
    capfd.readouterr()
    assert train("run.steps=3") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"lime-dist: checkpoint {folder}"), line
    assert names() == {"step_000002"}


# ---- crafted checkpoints, by each command that reads one


def sign(folder: Path, meta: dict) -> None:
    """With a true checksum, as whoever crafts one can make it."""
    del meta["sha256"]
    (folder / "meta.json").write_bytes(meta_text(meta))


def many_layers(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["config"]["model"]["num_layers"] = 10**9
    sign(folder, meta)


def outside(folder: Path) -> None:
    for end in ("json", "safetensors"):
        shutil.move(folder / f"{STEM}.{end}", folder.parent / f"{STEM}.{end}")
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"] = {stem.replace(STEM, f"../{STEM}"): sha256 for stem, sha256 in meta["files"].items()}
    sign(folder, meta)


def a_pipe(folder: Path) -> None:
    (folder / f"{STEM}.safetensors").unlink()
    os.mkfifo(folder / f"{STEM}.safetensors")


CRAFTED = {
    many_layers: "4 layers in its files, model.num_layers=1000000000 in its config; name another checkpoint",
    outside: "; name another checkpoint",
    a_pipe: f"{STEM}.safetensors: no regular file; name another checkpoint",
}


def test_commands_refuse_what_is_crafted(capfd: pytest.CaptureFixture[str]) -> None:
    assert train("run.steps=1") == 0
    whole = Path("run/checkpoints/step_000001")
    for craft, said in CRAFTED.items():
        shutil.rmtree("crafted", ignore_errors=True)
        shutil.copytree(whole, copy := Path("crafted/step_000001"))
        craft(copy)
        for command in (
            ["generate", str(copy), "--prompt", "a"],
            ["eval", "run.yaml", "--checkpoint", str(copy)],
            ["train", "run.yaml", "run.dir=other", f"checkpoint.resume={copy}"],
            ["plan", "run.yaml", "run.dir=other", "depth.pattern=top_p:0.5", f"depth.weights_from={copy}"],
        ):
            capfd.readouterr()
            assert main(command) == 2, command
            line = capfd.readouterr().err.splitlines()[-1]
            assert line.startswith(f"lime-dist: checkpoint {copy}") and line.endswith(said), (command, line)
