"""`lime-dist plan` as it is typed: without torch, on 128 layers, and its mistakes in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lime_dist.cli.command_line import main

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")
WITHOUT_TORCH = """
import sys
from lime_dist.cli.command_line import main
code = main(sys.argv[1:])
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


def test_128_layers_on_16_stages_without_torch(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    options = ["--json", "--compare", "--plot", str(picture)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH]
        + ["plan", QUICKSTART, "parallel.pp=16", "model.num_layers=128", "run.device=cpu", *options],
        capture_output=True,
        text=True,
        timeout=60,  # it takes less than one
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["totals"] == {"least": 512, "relay": 960}
    assert {"layout", "pattern", "stages", "hops", "totals", "compare"} <= report.keys()
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_virtual_stages_without_torch(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    overrides = ["parallel.pp=4", "parallel.virtual_stages=4", "model.num_layers=32", "run.device=cpu"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_TORCH,
            "plan",
            QUICKSTART,
            *overrides,
            "--json",
            "--compare",
            "--plot",
            str(picture),
        ],
        capture_output=True,
        text=True,
        timeout=60,  # it takes less than one
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["totals"] == {"least": 78, "relay": 84} and report["virtual_stages"] == 4
    assert [hop["boundary"] for hop in report["hops"]] == [hop % 4 for hop in range(15)]
    full = {cost["policy"]: cost["crossings"] for cost in report["compare"] if cost["pattern"] == "full"}
    assert full == report["totals"]
    assert "kept" in picture.read_text()


def test_text_has_the_comparison_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", QUICKSTART]) == 0
    table = capsys.readouterr().out
    assert main(["plan", QUICKSTART, "--compare"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(table) and "x LLaMA" in both and "x LLaMA" not in table


@pytest.mark.parametrize(
    ("name", "reason"), (("plan.png", "must end in .svg"), ("missing/plan.svg", "No such file or directory"))
)
def test_plot_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str) -> None:
    assert main(["plan", QUICKSTART, "--plot", str(tmp_path / name)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("lime-dist: --plot: ") and reason in captured.err
    assert list(tmp_path.iterdir()) == []
