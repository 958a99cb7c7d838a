"""`lime-dist twin`: the LLaMA config to compare a LIMe config with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lime_dist.cli.command_line import main
from lime_dist.comparison.twin import twin_folder
from lime_dist.config import check_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = {"model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96}}


def write(folder: Path, **sections: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | sections))
    return path


def twin(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    assert main(["twin", *map(str, arguments)]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["twin", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("lime_*.yaml")), ids=lambda path: path.stem)
def test_the_twins_are_the_shipped_ones(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = path.with_name(path.name.replace("lime_", "llama_"))
    assert twin(capsys, path) == yaml.safe_load(shipped.read_text())


def test_a_twin_can_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "twin.yaml"
    assert main(["twin", str(CONFIGS / "quickstart.yaml"), "run.seed=7", "--out", str(out)]) == 0
    assert capsys.readouterr().err == f"wrote {out}\n"
    config = check_config(load_config(out))
    assert (config.depth.router, config.run.dir, config.run.seed) == ("none", "runs/quickstart_llama", 7)
    assert main(["train", str(out), "--dry-run"]) == 0


def test_only_what_the_user_set_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, optim={"betas": [0.9, 0.99], "lr": "1e-3"})
    assert twin(capsys, path, "run.steps=9") == MINIMAL | {
        "optim": {"betas": [0.9, 0.99], "lr": "1e-3"},
        "run": {"steps": 9, "dir": "runs/default_llama"},
        "depth": {"router": "none"},
    }


@pytest.mark.parametrize(
    "depth",
    [
        {"pattern": "top_p:0.9", "weights_from": "runs/a/checkpoints/step_000010"},
        {"pattern": "budget:4MiB"},
        {"pattern": "edges:edges.yaml"},
        {"pattern": "within_stage"},
        {"pattern": {3: [0]}, "pattern_name": "mine"},
        {"switch_at": {10: "first:2"}},
        {"heads": "same", "router_init": "uniform"},
    ],
    ids=str,
)
def test_keys_without_a_meaning_for_llama_are_dropped(
    depth: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, depth={"entry": "kv", "router": "static", **depth})
    assert twin(capsys, path)["depth"] == {"entry": "kv", "router": "none"}
    out = tmp_path / "twin.yaml"
    assert main(["twin", str(path), "--out", str(out)]) == 0
    assert main(["train", str(out), "--dry-run"]) == 0


def test_other_patterns_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, depth={"pattern": "first:2"})
    assert twin(capsys, path)["depth"] == {"pattern": "first:2", "router": "none"}


@pytest.mark.parametrize(
    ("run_dir", "expected"),
    [
        ("runs/lime_x", "runs/llama_x"),
        ("runs/LIMe", "runs/llama"),
        ("/scratch/my-lime-2/", "/scratch/my-llama-2"),
        ("runs/x", "runs/x_llama"),
        ("lime/x", "lime/x_llama"),
        ("runs/sublime", "runs/sublime_llama"),
        ("runs/llama_x", "runs/llama_x_llama"),
        (".", "llama"),
        ("..", "../llama"),
    ],
)
def test_where_a_twin_trains(run_dir: str, expected: str) -> None:
    assert twin_folder(run_dir) == expected


def test_a_llama_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, depth={"router": "none"})
    expected = f"lime-dist: depth.router: {path} is a LLaMA config already (none); name a LIMe config"
    assert refused(capsys, path) == expected


@pytest.mark.parametrize("key", ["resume", "weights_from"])
def test_a_run_that_begins_with_routers_is_refused(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, checkpoint={key: "runs/a/checkpoints/step_000010"})
    line = refused(capsys, path)
    assert line.startswith(f"lime-dist: checkpoint.{key}: 'runs/a/checkpoints/step_000010' has routers")
    (mend,) = re.findall(r"checkpoint\.\w+=\w+", line)
    assert twin(capsys, path, mend)["depth"] == {"router": "none"}


def test_router_maps_are_not_asked_of_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "analysis" not in twin(capsys, write(tmp_path, analysis={"every": 10}))


def test_a_mistake_in_the_config_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path)
    assert refused(capsys, path, "optim.lrr=1") == "lime-dist: optim.lrr: unknown key; did you mean lr?"
    assert "config nowhere.yaml: No such file" in refused(capsys, "nowhere.yaml")


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path), tmp_path / "twin.yaml"
    out.write_text("mine")
    line = refused(capsys, path, "--out", out)
    assert line == f"lime-dist: --out: {out} exists already; name another file or add --overwrite"
    assert out.read_text() == "mine"
    assert main(["twin", str(path), "--out", str(out), "--overwrite"]) == 0
    assert check_config(load_config(out)).depth.router == "none"
