"""`lime-dist checkpoint inspect | verify | diff | convert | average` as they are typed."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from checkpoint_stand_ins import MODEL, all_tensors, write_checkpoint, write_first_format

from lime_dist.checkpoint.reader import CheckpointReader, step_folder
from lime_dist.cli.command_line import main


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for step in (3, 7):
        write_checkpoint(step_folder(Path("run/checkpoints"), step), step=step)
    return Path("run")


def checkpoint(*words: object) -> int:
    return main(["checkpoint", *map(str, words)])


def test_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint("inspect", run) == 0
    told = capsys.readouterr().out
    assert told.startswith("run/checkpoints/step_000007: step 7, 84 samples, ")
    assert "weight, exp_avg, exp_avg_sq" in told and "layers.2.mlp.down_proj.weight" in told and "[8, 12]" in told
    assert checkpoint("inspect", run / "checkpoints/step_000003", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    tensors = CheckpointReader(run / "checkpoints/step_000003").tensors
    assert facts["step"] == 3 and facts["tokens_seen"] == 36 * facts["config"]["data"]["seq_length"]
    assert facts["tensors"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    assert facts["parameters"] == sum(np.prod(shape) for shape in facts["tensors"].values())


def test_inspect_reads_no_tensor(run: Path) -> None:
    path = run / "checkpoints/step_000007/a.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert checkpoint("inspect", run) == 0


def test_verify_names_each_damaged_chunk(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run / "checkpoints/step_000003", run / "checkpoints/step_000007"]
    assert checkpoint("verify", *folders) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, folders))
    for stem in "ab":
        path = folders[1] / f"{stem}.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert checkpoint("verify", *folders) == 2
    told = capsys.readouterr()
    assert told.out.startswith(f"{folders[0]}: whole")
    first, second = told.err.splitlines()
    assert f"{folders[1]}/" in first and "is damaged" in first and "is damaged" in second and first != second


def test_diff(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = run / "checkpoints/step_000007"
    write_first_format(tmp_path / "same" / ours.name)
    assert checkpoint("diff", ours, tmp_path / "same" / ours.name) == 0
    assert "all tensors are equal to the bit" in capsys.readouterr().out
    tree = copy.deepcopy(MODEL)
    tree["run"]["seed"] = 5
    write_checkpoint(tmp_path / "other", step=3, tree=tree)
    assert checkpoint("diff", ours, tmp_path / "other") == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "step 7 | 3, samples 84 | 36" and told[1].startswith("run.seed: ")
    tensors = all_tensors(ours)
    assert {line.split(": ")[0] for line in told[2:]} == tensors.keys()
    (line,) = [line for line in told if line.startswith("exp_avg:norm.weight: ")]
    largest = abs(tensors["exp_avg:norm.weight"] - all_tensors(tmp_path / "other")["exp_avg:norm.weight"]).max()
    assert line.split()[1] == f"{largest:.3g}"


def test_convert_gives_checksums_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "step_000007", tmp_path / "new" / "step_000007"
    written = write_first_format(old)
    assert checkpoint("verify", old) == 0 and "has no checksums" in capsys.readouterr().out
    assert checkpoint("inspect", old) == 0 and "without checksums" in capsys.readouterr().out
    assert checkpoint("convert", old, "--out", new) == 0
    found = all_tensors(new)
    assert found.keys() == written.keys() and all(np.array_equal(found[key], written[key]) for key in written)
    before, after = CheckpointReader(old), CheckpointReader(new)
    assert after.meta.format == 2 and after.config == before.config
    assert (after.meta.step, after.meta.samples_seen) == (before.meta.step, before.meta.samples_seen)
    assert checkpoint("convert", old, "--out", new) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"lime-dist: --out: {new} exists; choose another name"


def test_average(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run / "checkpoints/step_000003", run / "checkpoints/step_000007"]
    assert checkpoint("average", *folders, "--out", "mean") == 0
    reader = CheckpointReader(Path("mean"))
    assert reader.kinds == ("weight",) and reader.meta.step == 7
    first, second = map(all_tensors, folders)
    for name, tensor in reader.tensors.items():
        mean = (first[f"weight:{name}"].astype(np.float64) + second[f"weight:{name}"]) / 2
        assert np.array_equal(reader.array("weight", tensor), mean.astype(np.float32))
    tree = copy.deepcopy(MODEL)
    tree["depth"] = {"pattern": "last:1"}
    write_checkpoint(tmp_path / "fewer", tree=tree)
    assert checkpoint("average", folders[0], tmp_path / "fewer", "--out", "other") == 2
    assert "has other edges" in capsys.readouterr().err and not Path("other").exists()


def test_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint("inspect", tmp_path) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"lime-dist: checkpoint {tmp_path}: neither a step_N folder nor a run's folder with one; train first, or correct the path"
    ]
