"""Texts that mean harm, and what must become of each: refused by its key, or passed on as it is. None is ever run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cluster_stand_ins import Bash, Ended, Run

from lime_dist.cluster.schema import ClusterConfig, ContainerConfig, check_cluster
from lime_dist.config import load_config, parse_config, to_dict
from lime_dist.config.paths import with_absolute_paths
from lime_dist.config.reading import build_section, dump_yaml
from lime_dist.errors import ConfigError

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
PLACES: dict[str, list[Callable[[str], Any]]] = {
    "str": [lambda text: text],
    "list[str]": [lambda text: [text], lambda text: [f"--comment={text}"], lambda text: [f"/a:{text}"]],
    "dict[str, str | int | float]": [lambda text: {"NCCL_DEBUG": text}, lambda text: {text: "value"}],
}
ATOMS = (
    *"$`'\";&|#!*?[]{}()<>=,:~%@/\\- \t\n\r\0\x1b\x7f\u2028\u202e\ud800\xa0aZ0_.üß漢",
    *(
        "$(",
        "${IFS}",
        "$'",
        "<(",
        "&&",
        "||",
        "<<<",
        "..",
        "--",
        "/dev/null",
        "%j",
        "%t",
        "@VALUES@",
        "@SETUP@",
        "@SBATCH@",
    ),
    *(
        "#SBATCH --wrap=",
        "\n#SBATCH ",
        "--export=",
        "--output=",
        "eval ",
        "nan",
        "null",
        "1e3",
        "true",
        "n[1-2]",
        "a:b",
    ),
)
COMMANDS = (f"touch {CANARY}", f">{CANARY}", f"touch${{IFS}}{CANARY}", f"$(touch {CANARY})", f"`touch {CANARY}`")
SHAPES = (
    "{}",
    "'{}'",
    '"{}"',
    "$({})",
    "`{}`",
    ";{};",
    "\n{}\n",
    "'; {} #",
    '"; {} #',
    "a[$({})]",
    "${{x:-$({})}}",
    "({})",
)


def random_texts(random: Random, count: int) -> Iterator[str]:
    """Some with commands within quotes, brackets and line ends; some of letters that shells and SLURM read."""
    for _ in range(count):
        parts = random.choices(ATOMS, k=random.randint(0, 6))
        if random.random() < 0.7:
            parts.insert(random.randint(0, len(parts)), random.choice(SHAPES).format(random.choice(COMMANDS)))
        yield "".join(parts)


# ---- cluster files


@dataclass(frozen=True, kw_only=True)
class Case:
    """A field of the cluster file, and a way in which a text gets into it. section: "", pyxis or apptainer."""

    section: str
    field: str
    place: int
    into: Callable[[str], Any]

    @property
    def name(self) -> str:
        return f"{self.section}.{self.field}.{self.place}".lstrip(".")

    @property
    def key(self) -> str:
        return f"cluster.{'container.' if self.section else ''}{self.field}"

    def __str__(self) -> str:
        return self.name


def _cases_of(section: str, cls: type) -> Iterator[Case]:
    """Of every field that takes texts. `setup` is code, on purpose."""
    for item in dataclasses.fields(cls):
        kind = next((kind for kind in PLACES if str(item.type).startswith(kind)), None)
        if kind is not None and item.name != "setup":
            for index, into in enumerate(PLACES[kind]):
                yield Case(section=section, field=item.name, place=index, into=into)


CASES = [
    *_cases_of("", ClusterConfig),
    *_cases_of("pyxis", ContainerConfig),
    *_cases_of("apptainer", ContainerConfig),
]


def make_cluster(section: str, field: str, value: Any) -> ClusterConfig:
    """Raises: ConfigError."""
    if not section:
        tree = BASE | {field: value}
    else:
        tree = BASE | {"container": CONTAINER | {"runtime": section} | {field: value}}
    return check_cluster(build_section(ClusterConfig, tree, "cluster."))


def check_cluster_values(case: Case, texts: Iterable[str], folder: Path) -> None:
    """Each is refused by its key, or reaches srun as it is; none is run."""
    bash = Bash(folder)
    for name in ("apptainer", "module"):
        bash.add_client(name, "")
    for index, text in enumerate(texts):
        try:
            cluster = make_cluster(case.section, case.field, case.into(text))
        except ConfigError as error:
            assert str(error).startswith(case.key) and "\n" not in str(error), (text, str(error))
            continue
        run = Run(bash, cluster, f"run{index}")
        ended = run.start(SRUN=TELL)
        assert ended.code == 0, (text, ended.text)
        check_nothing_ran(folder, text)
        check_passed(case, text, ended, run)


TELL = 'printf %s "${NCCL_DEBUG-}" >"${LIME_DIST_OUTCOME_FILE%/*}/told"'


def check_nothing_ran(folder: Path, text: str) -> None:
    """Beside the runs' own there is no file."""
    ours = ("bin", "record", "config.yaml")
    found = [path for path in folder.iterdir() if not path.name.startswith("run") and path.name not in ours]
    assert not found and not list(folder.rglob(CANARY)), (text, found)


def check_passed(case: Case, text: str, ended: Ended, run: Run) -> None:
    """What is meant for srun and for the ranks comes there unharmed, and the head holds what it holds without."""
    value, train = case.into(text), next(call for call in ended.calls if call[0] == "srun" and "train" in call)
    if case.field in ("python", "image"):
        assert any(argument in (text, f"--container-image={text}") for argument in train)
    elif case.field == "srun_flags":
        assert value[0] in train
    elif case.field == "mounts":
        assert {f"--bind={value[0]}", f"--container-mounts={value[0]}"} & set(train)
    elif case.field == "exclude_file":
        preflight = next(call for call in ended.calls if "preflight" in call)
        assert preflight[-1] == str(run.bash.folder / text)
    elif case.field == "export":
        told = (run.submission.slurm_dir / "outcomes" / "told").read_text()
        assert told == value.get("NCCL_DEBUG", ""), told
    flags = read_head(run)
    assert len(flags) == len({flag.partition("=")[0] for flag in flags})
    assert case.field != "sbatch_flags" or value[0] in flags
    assert f"--chdir={run.bash.folder}" in flags


def read_head(run: Run) -> list[str]:
    """The flags of the #SBATCH lines, one in each: sbatch knows quotes, \\ and # as the shell does."""
    lines = run.script.read_text(encoding="utf-8").split("\n")
    words = [shlex.split(line, comments=True) for line in (line[8:] for line in lines if line.startswith("#SBATCH "))]
    assert all(len(line) == 1 for line in words), words
    return [line[0] for line in words]


# ---- runs


def check_folder(text: str, folder: Path) -> None:
    """run.dir and the submission folder: refused by key, or all files land there."""
    name = f"run{text.replace('/', '_')}"
    bash = Bash(folder)
    try:
        run = Run(bash, make_cluster("", "preflight", True), name)
    except ConfigError as error:
        assert str(error).startswith("run.dir: ")
        return
    ended = run.start()
    assert ended.code == 0, (text, ended.text)
    check_nothing_ran(folder, text)
    assert [line[0] for line in run.history()] == ["submitted", "start", "end"]
    assert ended.called("srun")[0][-1] == f"{folder}/{name}/slurm/exclude"
    flags = dict(flag.partition("=")[::2] for flag in read_head(run))
    assert flags["--output"] == f"{run.submission.slurm_dir}/logs/".replace("%", "%%") + "%j.out"
    job_name = flags["--job-name"]
    assert job_name and not set(job_name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


CONFIG: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "vocab_size": 8},
    "data": {"tokenizer": "t"},
}


def text_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from text_keys(value, f"{prefix}{name}.")
        elif isinstance(value, str) or value is None:
            yield f"{prefix}{name}"


def check_config_values(text: str, folder: Path) -> None:
    """Texts of the run's config reach the ranks by config.yaml only, unharmed."""
    for key in text_keys(to_dict(parse_config(CONFIG))):
        tree = to_dict(parse_config(CONFIG))
        section, name = key.split(".")
        tree[section][name] = text
        try:
            config = parse_config(tree)
        except ConfigError as error:
            assert str(error).startswith(key), key
            continue
        (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        assert load_config(folder / "config.yaml") == with_absolute_paths(config)
