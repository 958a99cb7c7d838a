"""The batch script's text: golden ones for clusters of different habits, and values that mean harm."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster_stand_ins import Bash, Run
from hostile import CASES, HOSTILE, PLACES, Case, check_cluster_values, check_config_values, check_folder, make_cluster

from lime_dist.cluster.schema import ClusterConfig, ContainerConfig, load_cluster
from lime_dist.cluster.script import Submission, render_script
from lime_dist.cluster.submit import check_fit
from lime_dist.config import load_config
from lime_dist.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "sbatch"
# But quickstart.yaml, which is a smaller cpu.yaml; tests/unit/test_sample_pairs.py submits with it.
CLUSTERS = sorted((REPOSITORY / "configs" / "clusters").glob("[!q]*.yaml"))
SUBMISSION = Submission(
    run_dir=Path("/shared/runs/lime_1b"),
    folder=Path("/shared/lime_dist"),
    python="/shared/env/bin/python",
    stop_lead_seconds=300,
)


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_golden(file: Path) -> None:
    """To accept a change: python tests/unit/test_cluster_script.py, and read the diff."""
    text = render_script(load_cluster(file), SUBMISSION)
    golden = GOLDEN / f"{file.stem}.sbatch"
    assert text == golden.read_text()
    assert subprocess.run(["bash", "-n", golden]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.sbatch")), ids=lambda file: file.stem)
def test_shellcheck(file: Path) -> None:
    # SC1091: what the lines of `setup` source is not here
    checked = subprocess.run(["shellcheck", "--exclude=SC1091", file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_each_cluster_has_a_golden_script() -> None:
    assert [file.stem for file in CLUSTERS] == sorted(file.stem for file in GOLDEN.glob("*.sbatch"))
    assert len(CLUSTERS) == 5


@pytest.mark.parametrize("file", CLUSTERS, ids=lambda file: file.stem)
def test_clusters_hold_the_1b_configs(file: Path) -> None:
    """The examples are of use with the repository's own configs: eight ranks hold one replica."""
    cluster = load_cluster(file)
    config = load_config(REPOSITORY / "configs" / "lime_1b_gqa.yaml")
    assert cluster.world_size % (config.parallel.tp * config.parallel.pp) == 0
    check_fit(config, cluster)


# ---- values that mean harm: a few here, random ones in test_cluster_campaign.py


def test_every_field_with_text_is_a_case() -> None:
    """A new kind of field must get its place in hostile.py."""
    plain = ("int", "bool", "ContainerConfig")
    for cls in (ClusterConfig, ContainerConfig):
        for item in dataclasses.fields(cls):
            assert item.name == "setup" or item.type.startswith((*PLACES, *plain)), item.name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hostile_cluster_values(case: Case, tmp_path: Path) -> None:
    check_cluster_values(case, HOSTILE, tmp_path)


def test_exported_values_arrive(tmp_path: Path) -> None:
    run = Run(Bash(tmp_path), make_cluster("", "export", {"NCCL_DEBUG": HOSTILE[0], "NCCL_IB_HCA": "ü 漢 %j \\ '\""}))
    run.start(SRUN='printf "%s|%s" "$NCCL_DEBUG" "$NCCL_IB_HCA" >arrived')
    assert (tmp_path / "arrived").read_text() == f"{HOSTILE[0]}|ü 漢 %j \\ '\""


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD", "AWS_CREDENTIALS"])
@pytest.mark.parametrize("key", ["export", "environment"])
def test_secrets_are_not_written(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster.{key}: {name} looks like a secret; .*export it in your shell"):
        make_cluster("", key, {name: "x"} if key == "export" else [name])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_folders(text: str, tmp_path: Path) -> None:
    check_folder(text, tmp_path)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_config_values(text: str, tmp_path: Path) -> None:
    check_config_values(text, tmp_path)


def write_golden() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in CLUSTERS:
        (GOLDEN / f"{file.stem}.sbatch").write_text(render_script(load_cluster(file), SUBMISSION))


if __name__ == "__main__":
    write_golden()
