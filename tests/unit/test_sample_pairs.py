"""`lime-dist init` writes run configs and cluster files that fit each other: nodes x ranks are those of the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RUNS = sorted(path.stem for path in CONFIGS.glob("l*.yaml"))
GPU_CLUSTERS = ("apptainer", "chain", "pyxis", "torchrun")
PAIRS = [("quickstart", "quickstart"), *((run, cluster) for run in RUNS for cluster in GPU_CLUSTERS)]


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the samples, and token files in place of their corpora."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", "samples"]) == 0
    with IndexedWriter(tmp_path / "tokens", vocab_size=2048) as writer:
        writer.add_document(np.arange(5000) % 2048)
        writer.commit({"vocab_size": 2048, "tokens": 5000})


@pytest.mark.parametrize(("run", "cluster"), PAIRS)
def test_the_script_is_made(run: str, cluster: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the corpus, and the container's storage, which are the site's, nothing is changed."""
    own = ["data.train=tokens", "data.valid=tokens", "data.tokenizer=null"]
    if cluster == "pyxis":
        own.append(f"cluster.container.mounts=['{tmp_path}:{tmp_path}']")
    pair = [f"samples/{run}.yaml", "--cluster", f"samples/clusters/{cluster}.yaml"]
    assert main(["submit", *pair, "--dry-run", *own]) == 0, capsys.readouterr().err
    assert "#SBATCH --nodes" in capsys.readouterr().out


def test_every_cluster_file_is_of_a_pair() -> None:
    """cpu.yaml is for a run of your own: eight ranks, over two nodes."""
    assert {path.stem for path in CONFIGS.glob("clusters/*.yaml")} == {cluster for _, cluster in PAIRS} | {"cpu"}
