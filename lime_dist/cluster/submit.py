"""`lime-dist submit`: refuse what cannot run, write the files of the submission, hand them to sbatch.

Needs SLURM's clients and git only; no torch, so that it answers at once on a login node.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.checkpoint.reader import find_latest, step_of
from lime_dist.cluster.history import append_submitted, read_history
from lime_dist.cluster.lead import bound_lead, measure_lead
from lime_dist.cluster.schema import ClusterConfig, load_cluster
from lime_dist.cluster.script import Submission, check_paths, render_script
from lime_dist.config import Config, dump_yaml, load_config
from lime_dist.errors import ConfigError, LayoutError, one_line
from lime_dist.formats import format_bytes
from lime_dist.plan.run_plan import RunPlan
from lime_dist.preflight.input_files import check_files

_CLIENT_TIMEOUT_SECONDS = 60  # SLURM's clients wait for ever for a controller that is away


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a submission writes and says, checked."""

    config: Config
    cluster: ClusterConfig
    submission: Submission
    script: str
    lead_source: str


def prepare(config_file: Path, cluster_file: Path, overrides: Sequence[str]) -> Prepared:
    """Read, check and render; writes nothing. Raises: LimeDistError for what must not wait in a queue first."""
    cluster = load_cluster(cluster_file, [text for text in overrides if text.startswith("cluster.")])
    config = load_config(config_file, [text for text in overrides if not text.startswith("cluster.")])
    check_world(config, cluster)
    plan = ready_plan(config, cluster.world_size)
    config = plan.config
    check_fit(config, cluster)
    check_memory(plan, cluster)
    check_files(config)
    submission, lead_source = _plan_submission(config, cluster)
    check_mounts(cluster, submission)
    return Prepared(
        config=config,
        cluster=cluster,
        submission=submission,
        script=render_script(cluster, submission),
        lead_source=lead_source,
    )


def check_world(config: Config, cluster: ClusterConfig) -> None:
    """Raises: LayoutError unless the ranks of all nodes are those of the layout."""
    parallel, ranks = config.parallel, cluster.world_size
    replica = parallel.tp * parallel.pp
    if ranks != replica * parallel.dp if parallel.dp else ranks % max(replica, 1):
        needed = f"tp={parallel.tp} x pp={parallel.pp} x dp={parallel.dp or 'any'}"
        raise LayoutError(
            f"cluster.nodes: {cluster.nodes} nodes x {cluster.ranks_per_node} ranks are {ranks}, but the run is {needed}; "
            "change cluster.nodes, cluster.tasks_per_node (or gpus_per_node), or parallel"
        )


def check_mounts(cluster: ClusterConfig, submission: Submission) -> None:
    """Raises: ConfigError where a container would not see, under the same path, what the script names."""
    container = cluster.container
    if container is None or container.runtime != "pyxis":  # Apptainer mounts the working folder by itself
        return
    pairs = [mount.split(":")[:2] for mount in container.mounts]
    same = [Path(host) for host, inside in pairs if host == inside]
    for key, path in (("run.dir", submission.run_dir), ("working folder", submission.folder)):
        if not any(path.is_relative_to(mount) for mount in same):
            raise ConfigError(
                f"cluster.container.mounts: {key} {path} is in none of them; add a mount host:container with the same path twice"
            )


def check_fit(config: Config, cluster: ClusterConfig) -> None:
    """Raises: LayoutError where the run's layout and devices do not fit the nodes."""
    tp, ranks, gpus = config.parallel.tp, cluster.ranks_per_node, cluster.gpus_per_node
    if ranks % tp and not cluster.tp_across_nodes:
        raise LayoutError(
            f"parallel.tp: {tp} does not divide cluster.tasks_per_node={ranks}, so tensor groups would cross nodes; "
            "change one of them or set cluster.tp_across_nodes=true"
        )
    if config.run.device == "cuda" and not gpus:
        raise LayoutError("run.device: cuda with cluster.gpus_per_node=0; set cluster.gpus_per_node or run.device=cpu")
    if config.run.device != "cpu" and 0 < gpus < ranks:
        raise LayoutError(f"cluster.tasks_per_node: {ranks} ranks for gpus_per_node={gpus}; set it to {gpus}")


def check_memory(plan: RunPlan, cluster: ClusterConfig) -> None:
    """Raises: LayoutError when a stage is estimated to need more than `cluster.gpu_memory`."""
    if cluster.gpu_memory_bytes is None or not cluster.gpus_per_node:
        return
    needs = [stage.total_bytes for stage in plan.memory]
    worst = max(range(len(needs)), key=needs.__getitem__)
    if needs[worst] > cluster.gpu_memory_bytes:
        raise LayoutError(
            f"cluster.gpu_memory: {cluster.gpu_memory}, but a rank of stage {worst} needs about {format_bytes(needs[worst])}; "
            "raise parallel.pp or parallel.tp, lower data.micro_batch_size (or raise pipeline.num_microbatches), or set parallel.recompute=layer"
        )


def _plan_submission(config: Config, cluster: ClusterConfig) -> tuple[Submission, str]:
    submission = Submission(
        run_dir=Path(os.path.abspath(config.run.dir)),
        folder=Path.cwd(),
        python=sys.executable,
        stop_lead_seconds=0,
    )
    check_paths(submission)
    chosen = cluster.stop_lead_seconds
    lead, source = measure_lead(submission.run_dir) if chosen is None else (chosen, "cluster.stop_lead_seconds")
    lead, source = bound_lead(lead, source, cluster.time_seconds)
    return dataclasses.replace(submission, stop_lead_seconds=lead), source


def submit(prepared: Prepared) -> str:
    """Write the files, call sbatch, note it in the history; the job's id. Raises: ConfigError."""
    submission, cluster = prepared.submission, prepared.cluster
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "environment: sbatch is not on PATH; submit on a login node, or read the script with --dry-run"
        )
    _refuse_queued(submission)
    _refuse_finished(prepared.config, submission)
    _write_files(prepared)
    bad_hosts = read_bad_hosts(submission.exclude_file(cluster))
    exclude = [f"--exclude={','.join(bad_hosts)}"] if bad_hosts else []
    answer = _ask(["sbatch", "--parsable", *exclude, str(submission.script)], sbatch_environment(cluster))
    if answer.returncode:
        raise ConfigError(f"sbatch: {' '.join(answer.stderr.split())}; change what it names in the cluster file")
    job = answer.stdout.strip().split(";")[0]
    append_submitted(submission.history, job, newest_step(submission))
    return job


def _refuse_queued(submission: Submission) -> None:
    """A second job of the same run would write the same files. A chain's successor is known by its script."""
    known = {event.job for event in read_history(submission.history)[-1:]}
    answer = _ask(["squeue", "--noheader", "--user", str(os.getuid()), "--format=%i %T %o"])
    for line in answer.stdout.splitlines():
        job, state, command = (line.split(" ", 2) + ["", ""])[:3]
        if job in known or command.split(" successor")[0] == str(submission.script):
            raise ConfigError(f"run.dir: job {job} of this run is still {state}; scancel it first")


def _refuse_finished(config: Config, submission: Submission) -> None:
    if config.checkpoint.resume == "auto" and newest_step(submission) >= config.run.steps:
        raise ConfigError(f"run.steps: all {config.run.steps} steps of {config.run.dir} are done; raise it to go on")


def newest_step(submission: Submission) -> int:
    """Of the run's complete checkpoints; 0 for none."""
    newest = find_latest(submission.run_dir / "checkpoints")
    return 0 if newest is None else step_of(newest)


def sbatch_environment(cluster: ClusterConfig, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Without the SBATCH_ variables, which beat the script's own lines, but for a site's defaults of keys that are not set."""
    names = ("partition", "account", "qos", "constraint", "reservation")
    kept = {f"SBATCH_{name.upper()}" for name in names if getattr(cluster, name) is None}
    return {name: value for name, value in environment.items() if not name.startswith("SBATCH_") or name in kept}


def _ask(command: list[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Raises: ConfigError when the client is not there or does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_CLIENT_TIMEOUT_SECONDS, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"environment: {one_line(error)}; see whether SLURM answers here") from None


def read_bad_hosts(path: Path) -> list[str]:
    """The hosts of an exclude file, sorted; none when it is not there."""
    if not path.is_file():
        return []
    lines = {line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()}
    return sorted(line for line in lines if line and all(letter.isalnum() or letter in "._-" for letter in line))


def _write_files(prepared: Prepared) -> None:
    folder = prepared.submission.slurm_dir
    files = {
        "job.sbatch": prepared.script,
        "config.yaml": dump_yaml(prepared.config),
        "cluster.yaml": yaml.safe_dump(dataclasses.asdict(prepared.cluster), sort_keys=False),
        **_git_files(),
    }
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "outcomes").mkdir(exist_ok=True)
        prepared.submission.history.touch()
        for name in ("git.txt", "git.patch"):
            (folder / name).unlink(missing_ok=True)  # an earlier submission's, from another folder
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"run.dir: {folder}: {error.strerror or error}; name a folder that can be written") from None


def _git_files() -> dict[str, str]:
    """The state of the code in the working folder; none when it is no repository."""
    commit, branch = _git("rev-parse", "HEAD"), _git("rev-parse", "--abbrev-ref", "HEAD")
    if commit is None:
        return {}
    text = f"commit {commit.strip()}\nbranch {(branch or '').strip()}\n\n{_git('status', '--short') or ''}"
    return {
        "git.txt": text,
        "git.patch": _git("diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD") or "",
    }


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], capture_output=True, timeout=_CLIENT_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.decode("utf-8", "surrogateescape") if answer.returncode == 0 else None
