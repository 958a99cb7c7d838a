"""The batch script: `job.sh` with its head filled in. Pure: values to text; runs and writes nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from lime_dist.cluster.schema import ClusterConfig, check_text
from lime_dist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What the script needs besides the cluster's keys; all paths absolute."""

    run_dir: Path
    folder: Path  # where `lime-dist submit` was called; relative paths of the config begin there
    python: str  # of the ranks, outside a container
    stop_lead_seconds: int

    @property
    def slurm_dir(self) -> Path:
        return self.run_dir / "slurm"

    @property
    def script(self) -> Path:
        return self.slurm_dir / "job.sbatch"

    @property
    def history(self) -> Path:
        return self.slurm_dir / "history.tsv"

    def exclude_file(self, cluster: ClusterConfig) -> Path:
        return self.slurm_dir / "exclude" if cluster.exclude_file is None else self.folder / cluster.exclude_file


def render_script(cluster: ClusterConfig, submission: Submission) -> str:
    """The whole text of job.sbatch. Raises: ConfigError for a path that SLURM cannot be handed."""
    check_paths(submission)
    parts = {
        "@SBATCH@": [f"#SBATCH {flag}" for flag in _directives(cluster, submission)],
        "@VALUES@": [f"{name}={value}" for name, value in _values(cluster, submission).items()],
        "@SETUP@": cluster.setup,
    }
    template = resources.files("lime_dist.cluster").joinpath("job.sh").read_text(encoding="utf-8")
    return re.sub(
        r"^(@[A-Z]+@)\n", lambda found: "".join(f"{line}\n" for line in parts[found[1]]), template, flags=re.MULTILINE
    )


def check_paths(submission: Submission) -> None:
    """Raises: ConfigError for what neither SLURM nor bash may be handed."""
    for key, path in (("run.dir", submission.run_dir), ("working folder", submission.folder)):
        check_text(key, str(path))
        if "\\" in str(path):
            raise ConfigError(f"{key}: {path} has a backslash, with which SLURM writes no logs there; rename it")
    check_text("cluster.python", submission.python)


def _directives(cluster: ClusterConfig, submission: Submission) -> list[str]:
    """The flags of sbatch, as its #SBATCH lines must quote them."""
    flags = {
        "job-name": cluster.job_name or _job_name(submission.run_dir),
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.ranks_per_node,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory,
        **_gpu_flags(cluster),
        "time": cluster.time,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "output": f"{str(submission.slurm_dir).replace('%', '%%')}/logs/%j.out",
        "chdir": submission.folder,
    }
    given = [f"--{name}={_sbatch_quote(str(value))}" for name, value in flags.items() if value is not None]
    free = [_quote_flag(flag) for flag in cluster.sbatch_flags]
    return [*given, "--open-mode=append", "--requeue" if cluster.requeue == "requeue" else "--no-requeue", *free]


def _gpu_flags(cluster: ClusterConfig) -> dict[str, str]:
    if not cluster.gpus_per_node or cluster.gpu_request == "none":
        return {}
    count = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else str(cluster.gpus_per_node)
    return {"gres": f"gpu:{count}"} if cluster.gpu_request == "gres" else {"gpus-per-node": count}


def _job_name(run_dir: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", run_dir.name).lstrip("-.") or "lime_dist"


def _quote_flag(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return f"{name}={_sbatch_quote(value)}" if equals else name


def _sbatch_quote(text: str) -> str:
    """sbatch splits #SBATCH lines by rules of its own: a # begins a comment, and \\ escapes within double quotes too."""
    if re.fullmatch(r"[A-Za-z0-9_.,:@/%+=-]+", text, re.ASCII):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _values(cluster: ClusterConfig, submission: Submission) -> dict[str, str]:
    """The variables that the script reads, quoted for bash."""
    texts = {
        "run_dir": submission.run_dir,
        "python": cluster.python or (cluster.container.python if cluster.container else submission.python),
        "launcher": cluster.launcher,
        "mode": cluster.requeue,
        "max_restarts": cluster.max_restarts,
        "max_starts_without_progress": cluster.max_starts_without_progress,
        "exclude_file": submission.exclude_file(cluster),
        "time_limit": cluster.time_seconds,
        "stop_lead": submission.stop_lead_seconds,
        "measure_lead": "yes" if cluster.stop_lead_seconds is None else "no",
        "ranks_per_node": cluster.ranks_per_node,
        "cpus_per_task": cluster.cpus_per_task or "",
        "preflight": "yes" if cluster.preflight else "no",
    }
    arrays = {
        "srun_flags": [*cluster.srun_flags, *_pyxis_flags(cluster, submission)],
        "container": _apptainer(cluster, submission),
        "modules": cluster.modules,
        "exports": [f"{name}={value}" for name, value in cluster.export.items()],
        "shown": cluster.environment,
    }
    return {name: shlex.quote(str(value)) for name, value in texts.items()} | {
        name: _array(items) for name, items in arrays.items()
    }


def _array(items: Iterable[str]) -> str:
    return f"({' '.join(map(shlex.quote, items))})"


def _pyxis_flags(cluster: ClusterConfig, submission: Submission) -> list[str]:
    container = cluster.container
    if container is None or container.runtime != "pyxis":
        return []
    mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return [f"--container-image={container.image}", *mounts, f"--container-workdir={submission.folder}"]


def _apptainer(cluster: ClusterConfig, submission: Submission) -> list[str]:
    container = cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    gpus = ["--nv"] if cluster.gpus_per_node else []
    binds = [f"--bind={mount}" for mount in container.mounts]
    return ["apptainer", "exec", *gpus, *binds, f"--pwd={submission.folder}", container.image]
