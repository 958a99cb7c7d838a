"""The batch script's text: golden ones for clusters of different habits, and values that mean harm."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cluster_stand_ins import Bash, Run

from lime_dist.cluster.schema import ClusterConfig, ContainerConfig, check_cluster, load_cluster
from lime_dist.cluster.script import Submission, render_script
from lime_dist.cluster.submit import check_fit
from lime_dist.config import Config, load_config, parse_config, to_dict
from lime_dist.config.reading import build_section, dump_yaml
from lime_dist.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "sbatch"
CLUSTERS = sorted((REPOSITORY / "configs" / "clusters").glob("*.yaml"))
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


# ---- values that mean harm

CANARY = "canary"
HOSTILE = [
    f"$(touch {CANARY})",
    f"`touch {CANARY}`",
    f"a; touch {CANARY}; b",
    f"a' ; touch {CANARY} ; 'b",
    f'a" ; touch {CANARY} ; "b',
    f"a\ntouch {CANARY}\n",
    f"a\n#SBATCH --wrap='touch {CANARY}'",
    f"a && touch {CANARY} #",
    f"a | touch {CANARY}",
    f"a\rtouch {CANARY}",
    f"${{IFS}}touch {CANARY}",
    "two words",
    "ünï/ço∂é 漢字",
    "-rf",
    "--wrap=true",
    "%j%t%%",
    "back\\slash",
    "~root",
    "* ? [a]",
    "@VALUES@",
    "x\x1b[31m",
    "",
]
BASE: dict[str, Any] = {"nodes": 2, "tasks_per_node": 2, "time": "60", "environment": ["HOME"]}
CONTAINER: dict[str, Any] = {"image": "image.sif", "runtime": "apptainer"}
# What a field of each type is given, with the hostile text somewhere in it.
PLACES = {
    "str": [lambda text: text],
    "list[str]": [lambda text: [text], lambda text: [f"--comment={text}"], lambda text: [f"/a:{text}"]],
    "dict[str, str | int | float]": [lambda text: {"NCCL_DEBUG": text}, lambda text: {text: "value"}],
}


def places_of(cls: type) -> list[tuple[str, Any]]:
    """(field, how a text gets into it) of every field of a section that takes texts. `setup` is code, on purpose."""
    fields = [item for item in dataclasses.fields(cls) if item.name != "setup"]
    kinds = {item.name: kind for item in fields for kind in PLACES if str(item.type).startswith(kind)}
    return [(name, place) for name, kind in kinds.items() for place in PLACES[kind]]


CASES = [
    *(("", name, place) for name, place in places_of(ClusterConfig)),
    *((f"{runtime}.", name, place) for runtime in ("pyxis", "apptainer") for name, place in places_of(ContainerConfig)),
]


def test_every_field_with_text_is_a_case() -> None:
    """A new kind of field must get its place above."""
    plain = ("int", "bool", "ContainerConfig")
    for cls in (ClusterConfig, ContainerConfig):
        for item in dataclasses.fields(cls):
            assert item.name == "setup" or item.type.startswith((*PLACES, *plain)), item.name


def make_cluster(section: str, name: str, value: Any) -> ClusterConfig:
    if not section:
        tree = BASE | {name: value}
    else:
        tree = BASE | {"container": CONTAINER | {"runtime": section.rstrip(".")} | {name: value}}
    return check_cluster(build_section(ClusterConfig, tree, "cluster."))


@pytest.mark.parametrize(("section", "name", "place"), CASES, ids=[f"{c[0]}{c[1]}" for c in CASES])
def test_hostile_cluster_values(section: str, name: str, place: Any, tmp_path: Path) -> None:
    """Each value is refused by its key, or reaches srun as it is; none is run."""
    accepted = []
    for text in HOSTILE:
        try:
            accepted.append((text, make_cluster(section, name, place(text))))
        except ConfigError as error:
            key = f"cluster.{'container.' if section else ''}{name}"
            assert str(error).startswith(key) and "\n" not in str(error), (text, str(error))
    bash = Bash(tmp_path)
    bash.add_client("apptainer", "")
    for index, (text, cluster) in enumerate(accepted):
        run = Run(bash, cluster, f"run{index}")
        bash.add_client("module", "")
        ended = run.start()
        assert not list(tmp_path.rglob(CANARY)), (text, cluster)
        assert ended.code == 0, (text, ended.text)
        check_passed(name, text, place(text), ended.calls, run)
        directives = [line for line in run.script.read_text().splitlines() if line.startswith("#SBATCH")]
        assert len(directives) == len({line.partition("=")[0] for line in directives})


def check_passed(name: str, text: str, value: Any, calls: list[list[str]], run: Run) -> None:
    """The fields that reach srun do so unharmed."""
    train = next(call for call in calls if call[0] == "srun" and "train" in call)
    if name in ("python", "image"):
        assert any(argument in (text, f"--container-image={text}") for argument in train)
    elif name == "srun_flags":
        assert value[0] in train
    elif name == "mounts":
        assert {f"--bind={value[0]}", f"--container-mounts={value[0]}"} & set(train)
    elif name == "exclude_file":
        preflight = next(call for call in calls if "preflight" in call)
        assert preflight[-1] == str(run.bash.folder / text)


def test_exported_values_arrive(tmp_path: Path) -> None:
    run = Run(Bash(tmp_path), make_cluster("", "export", {"NCCL_DEBUG": HOSTILE[0], "TZ": "ü 漢 %j \\ '\""}))
    run.start(SRUN='printf "%s|%s" "$NCCL_DEBUG" "$TZ" >arrived')
    assert (tmp_path / "arrived").read_text() == f"{HOSTILE[0]}|ü 漢 %j \\ '\""


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD", "AWS_CREDENTIALS"])
@pytest.mark.parametrize("key", ["export", "environment"])
def test_secrets_are_not_written(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster.{key}: {name} looks like a secret; .*export it in your shell"):
        make_cluster("", key, {name: "x"} if key == "export" else [name])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_folders(text: str, tmp_path: Path) -> None:
    """run.dir and the submission folder: refused by key, or all files land there."""
    name = text.replace("/", "_") or "empty"
    bash = Bash(tmp_path)
    try:
        run = Run(bash, make_cluster("", "preflight", True), name)
    except ConfigError as error:
        assert str(error).startswith("run.dir: ")
        return
    ended = run.start()
    assert ended.code == 0 and not list(tmp_path.rglob(CANARY)), ended.text
    assert [line[0] for line in run.history()] == ["submitted", "start", "end"]
    assert ended.called("srun")[0][-1] == f"{tmp_path}/{name}/slurm/exclude"
    job_name = run.script.read_text().split("--job-name=")[1].split("\n")[0]
    assert job_name and not set(job_name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def text_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            found += text_keys(value, f"{prefix}{name}.")
        elif isinstance(value, str) or value is None:
            found.append(f"{prefix}{name}")
    return found


CONFIG: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "vocab_size": 8},
    "data": {"tokenizer": "t"},
}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_config_values(text: str, tmp_path: Path) -> None:
    """Texts of the run's config reach the ranks by config.yaml only, unharmed."""
    for key in text_keys(to_dict(parse_config(CONFIG))):
        tree = to_dict(parse_config(CONFIG))
        section, name = key.split(".")
        tree[section][name] = text
        try:
            config: Config = parse_config(tree)
        except ConfigError as error:
            assert str(error).startswith(key), key
            continue
        (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml") == config
        assert text not in render_script(make_cluster("", "nodes", 2), SUBMISSION) or text in ("", "* ? [a]")


def write_golden() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in CLUSTERS:
        (GOLDEN / f"{file.stem}.sbatch").write_text(render_script(load_cluster(file), SUBMISSION))


if __name__ == "__main__":
    write_golden()
