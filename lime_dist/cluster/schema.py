"""The keys that describe a cluster and what one run asks of it: a frozen dataclass, read and checked.

Owns what SLURM and bash may be handed: every text that reaches either is checked here, by key.
Knows neither the run's config nor the script.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from lime_dist.cluster.allowed import OWNED_FLAGS, may_export, may_pass
from lime_dist.config.reading import apply_override, build_section, read_yaml
from lime_dist.errors import ConfigError
from lime_dist.formats import parse_bytes

SHOWN_VARIABLES = (
    "SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_MEM_PER_NODE",
    "SLURM_JOB_GPUS", "SLURM_RESTART_COUNT", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_DEVICE_MAX_CONNECTIONS",
    "NCCL_DEBUG", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_IB_DISABLE", "NCCL_NET", "NCCL_P2P_LEVEL",
    "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """What the ranks run in; the script itself runs on the node."""

    image: str  # a path, or what the runtime takes, such as docker://...
    runtime: str = "pyxis"  # pyxis (srun --container-image) | apptainer
    mounts: list[str] = field(default_factory=list)  # host:container[:options]; the run's folder must be among them
    python: str = "python"  # the interpreter in the image that has lime_dist


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What `sbatch` is asked for, how ranks are started, and when a run that ended is started again."""

    nodes: int
    time: str | int  # SLURM's: minutes, or [days-]hours:minutes:seconds
    gpus_per_node: int = 0  # 0: ranks on CPUs
    tasks_per_node: int | None = None  # ranks on a node; None: gpus_per_node
    cpus_per_task: int | None = None
    memory: str | int | None = None  # of a node: --mem
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    job_name: str | None = None  # None: the last part of run.dir
    gpu_request: str = "gres"  # gres (--gres=gpu:N) | gpus-per-node | none (what the partition or sbatch_flags give)
    gpu_type: str | None = None
    gpu_memory: str | None = None  # of one GPU, such as 80GiB: larger runs are refused before they wait in the queue
    container: ContainerConfig | None = None
    modules: list[str] = field(default_factory=list)  # `module load` of each
    # Lines of bash, run on the first node before anything else, copied as they are. But for `python` and `container`, the
    # only values that are run.
    setup: list[str] = field(default_factory=list)
    # Further flags, --name or --name=value, and variables for the ranks, over the script's own: those of allowed.py.
    sbatch_flags: list[str] = field(default_factory=list)
    srun_flags: list[str] = field(default_factory=list)
    environment: list[str] = field(default_factory=lambda: list(SHOWN_VARIABLES))  # printed into the log; no others
    export: dict[str, str | int | float] = field(default_factory=dict)
    python: str | None = None  # None: the interpreter that submits, or container.python
    launcher: str = "srun"  # srun: a task is a rank | torchrun: a task is a node's torchrun
    requeue: str = "requeue"  # requeue: the same job again | chain: a successor waits in the queue | never
    max_restarts: int = 20
    max_starts_without_progress: int = 3
    stop_lead_seconds: int | None = None  # how long before the time limit ranks are told to save; None: from metrics
    tp_across_nodes: bool = False  # allow a tensor group on several nodes
    preflight: bool = True  # check the hosts before each start
    exclude_file: str | None = None  # bad hosts, one a line; None: slurm/exclude in the run's folder

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node if self.tasks_per_node is None else self.tasks_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def time_seconds(self) -> int:
        return parse_time(str(self.time))

    @property
    def gpu_memory_bytes(self) -> int | None:
        return None if self.gpu_memory is None else parse_bytes(self.gpu_memory)


def load_cluster(path: str | Path, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Read and check a cluster file; `overrides` are `cluster.key=value`. Raises: ConfigError."""
    tree = {"cluster": read_yaml(path, "cluster file", "keys such as `nodes:` and `time:`")}
    for override in overrides:
        apply_override(tree, override)
    return check_cluster(build_section(ClusterConfig, tree["cluster"], "cluster."))


def check_cluster(cluster: ClusterConfig) -> ClusterConfig:
    """Refuse what SLURM or bash must not be handed. Raises: ConfigError, naming the key and the fix."""
    for key, text in _texts(cluster, "cluster."):
        check_text(key, text)
    _check_choices(cluster)
    _check_numbers(cluster)
    _check_directives(cluster)
    _check_names(cluster)
    for key, flags in (("sbatch_flags", cluster.sbatch_flags), ("srun_flags", cluster.srun_flags)):
        for flag in flags:
            _check_flag(key, flag)
    _check_programs(cluster)
    return cluster


def check_text(key: str, text: str) -> None:
    """Refuse control characters, line ends and what is no text in UTF-8. Raises: ConfigError."""
    bad = next((letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")), None)
    _require(bad is None, f"{key}: {text!r} holds the control character {bad!r}; remove it")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _texts(section: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Every text below `section` with its key."""
    for item in fields(section):
        yield from _texts_of(getattr(section, item.name), f"{prefix}{item.name}")


def _texts_of(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts_of(item, f"{key}[{index}]")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield key, name
            yield from _texts_of(item, f"{key}.{name}")
    elif is_dataclass(value):
        yield from _texts(value, f"{key}.")


_CHOICES = {
    "gpu_request": ("gres", "gpus-per-node", "none"),
    "launcher": ("srun", "torchrun"),
    "requeue": ("requeue", "chain", "never"),
}


def _check_choices(cluster: ClusterConfig) -> None:
    chosen = {name: (getattr(cluster, name), known) for name, known in _CHOICES.items()}
    if cluster.container is not None:
        chosen["container.runtime"] = (cluster.container.runtime, ("pyxis", "apptainer"))
    for name, (value, known) in chosen.items():
        _require(value in known, f"cluster.{name}: {value!r} is unknown; use {' or '.join(known)}")


_AT_LEAST = {
    "nodes": 1, "gpus_per_node": 0, "cpus_per_task": 1, "max_restarts": 0, "max_starts_without_progress": 1,
    "stop_lead_seconds": 1,
}  # fmt: skip


def _check_numbers(cluster: ClusterConfig) -> None:
    for name, least in _AT_LEAST.items():
        value = getattr(cluster, name)
        _require(value is None or value >= least, f"cluster.{name}: {value} must be at least {least}")
    _require(
        cluster.ranks_per_node >= 1,
        f"cluster.tasks_per_node: {cluster.tasks_per_node} with gpus_per_node={cluster.gpus_per_node}; set it to at least 1",
    )
    _require(
        parse_time(str(cluster.time)) > 0, f"cluster.time: {cluster.time!r} is no time; write 12:00:00 or 2-12:00:00"
    )
    lead = cluster.stop_lead_seconds or 0
    _require(
        lead < cluster.time_seconds,
        f"cluster.stop_lead_seconds: {lead} must be below cluster.time; lower it",
    )
    _require(
        cluster.gpu_memory is None or bool(cluster.gpu_memory_bytes),
        f"cluster.gpu_memory: {cluster.gpu_memory!r} is no size; write 80GiB",
    )


def parse_time(text: str) -> int:
    """Seconds of one of SLURM's forms M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; 0 when it is none."""
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,9})(?::(\d{1,2}))?(?::(\d{1,2}))?", text, re.ASCII)
    if not found:
        return 0
    days, *parts = found.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is None and parts[2] is None:
        return first * 60 + second
    return int(days or 0) * 86400 + first * 3600 + second * 60 + third


_WORD = r"[A-Za-z0-9_][A-Za-z0-9_.+@/-]*"
# What may stand in an #SBATCH line; everything else is refused.
_DIRECTIVES = {
    "partition": rf"{_WORD}(,{_WORD})*",
    "account": _WORD,
    "qos": rf"{_WORD}(,{_WORD})*",
    "reservation": rf"{_WORD}(,{_WORD})*",
    "job_name": r"[A-Za-z0-9_][A-Za-z0-9_.-]*",
    "gpu_type": r"[A-Za-z0-9_][A-Za-z0-9_.-]*",
    "constraint": r"[A-Za-z0-9_(\[][A-Za-z0-9_.,&|\[\]()*:@-]*",
    "memory": r"\d+[KMGT]?",
}


def _check_directives(cluster: ClusterConfig) -> None:
    for name, allowed in _DIRECTIVES.items():
        value = getattr(cluster, name)
        _require(
            value is None or bool(re.fullmatch(allowed, str(value), re.ASCII)),
            f"cluster.{name}: {value!r} has characters that SLURM does not take here; it must match {allowed}",
        )


_VARIABLE = r"[A-Za-z_][A-Za-z0-9_]*"
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


def _check_names(cluster: ClusterConfig) -> None:
    for key, names in (("environment", cluster.environment), ("export", cluster.export)):
        for name in names:
            _require(
                bool(re.fullmatch(_VARIABLE, name, re.ASCII)),
                f"cluster.{key}: {name!r} is no name of a variable; use letters, digits and _",
            )
            _require(
                not _SECRET.search(name),
                f"cluster.{key}: {name} looks like a secret; remove it and export it in your shell: it is inherited",
            )
    for name, value in cluster.export.items():
        _require(
            may_export(name, value),
            f"cluster.export: {name} is not among the variables known to load and run nothing; "
            "set it under cluster.setup, whose lines are bash",
        )


def _check_flag(key: str, flag: str) -> None:
    name = flag.partition("=")[0]
    _require(
        bool(re.fullmatch(r"--[a-z][a-z0-9-]*", name, re.ASCII)),
        f"cluster.{key}: {flag!r} must be --name or --name=value",
    )
    owner = OWNED_FLAGS.get(name)
    _require(owner is None, f"cluster.{key}: {name} is set from cluster.{owner}; remove it and set that")
    _require(
        may_pass(key, flag),
        f"cluster.{key}: {flag!r} is not among the flags known to run no program and to read no file; "
        "remove it, or put its work under cluster.setup, whose lines are bash",
    )


def _check_programs(cluster: ClusterConfig) -> None:
    """Texts that stand where a command could take them for a flag."""
    for index, module in enumerate(cluster.modules):
        _require(
            bool(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+/@:=~-]*", module, re.ASCII)) and ".." not in module,
            f"cluster.modules[{index}]: {module!r} is no name of a module; use letters, digits and _.+/@:=~-, and no ..",
        )
    plain = {"python": cluster.python, "exclude_file": cluster.exclude_file}
    if cluster.container is not None:
        container = cluster.container
        plain |= {"container.image": container.image, "container.python": container.python}
        plain |= {f"container.mounts[{index}]": mount for index, mount in enumerate(container.mounts)}
        for index, mount in enumerate(container.mounts):
            _require(
                "," not in mount and ":" in mount.strip(":"),
                f"cluster.container.mounts[{index}]: {mount!r} must be host:container, without commas",
            )
    for key, text in plain.items():
        _require(
            text is None or (text.strip() != "" and not text.startswith("-")),
            f"cluster.{key}: {text!r} must not be empty or begin with -; write a path",
        )
