"""What all ranks must have alike before the first step, and what rank 0 decides for all: where the run goes on.

Disks that ranks share may show a new file late, and a launcher may start ranks with other files: both end in wrong
numbers or a hang if nobody compares.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lime_dist
from lime_dist.checkpoint.checking import read_meta
from lime_dist.checkpoint.edges import evaluated_config, resume_folder, resumed_config, resumes
from lime_dist.config import Config, DepthConfig, to_dict
from lime_dist.data.checksums import block_digest
from lime_dist.errors import CheckpointError, ConfigError, LimeDistError, one_line
from lime_dist.lifecycle.launcher import host_name
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.training.agreement import gather, tell_all

VISIBLE_SECONDS = 30.0  # how long a shared disk may take to show a checkpoint to another host
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Start:
    """Where all ranks begin. folder: the checkpoint to load, None for a fresh start."""

    config: Config
    folder: Path | None
    step: int = 0


def check_alike(config: Config, device: torch.device) -> None:
    """Compare code, config and token files over the ranks. Collective: world. Raises: ConfigError on all of them."""
    facts = _facts(config)
    if any(gather(resumes(config), device)):
        # Then the edges are the checkpoint's, which rank 0 names: not every rank may see it yet.
        del facts["depth.pattern"], facts["depth.pattern_name"]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(gather(digest, device))) == 1:
        return
    (first, first_host), *others = gather([facts, host_name()], device)
    for rank, (theirs, host) in enumerate(others, start=1):
        key = next((key for key in first | theirs if first.get(key) != theirs.get(key)), None)
        if key is not None:
            raise ConfigError(
                f"{key}: {first.get(key)} on rank 0 ({first_host}), {theirs.get(key)} on rank {rank} ({host}); "
                "start all ranks with the same code, config and files"
            )


def _facts(config: Config) -> dict[str, Any]:
    """By name, in the order in which a difference is told."""
    values = {f"{section}.{key}": value for section, key, value in _keys(to_dict(config))}
    sources = (*config.data.train, *config.data.valid)
    return {
        "lime_dist": f"{lime_dist.__version__} {_code_digest()}",
        "torch": str(torch.__version__),
        **values,
        **{f"token file {source.path}": _token_file(source.path) for source in sources},
    }


def _keys(tree: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    return [
        (section, key, value)
        for section, keys in tree.items()
        if isinstance(keys, Mapping)
        for key, value in keys.items()
    ]


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(lime_dist.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _token_file(prefix: str) -> str:
    """The sizes and checksums of its files, the meta file's too, which names the tokenizer."""
    paths = [Path(f"{prefix}.{suffix}") for suffix in ("bin", "idx", "mask", "meta.json")]
    return ", ".join(f"{path.stat().st_size} bytes {block_digest(path)[:12]}" for path in paths if path.is_file())


def agree_on_start(config: Config, device: torch.device) -> Start:
    """The checkpoint that rank 0 finds, and the edges with which it goes on; at a step of `depth.switch_at` its own, as what
    was due before the switch may still be. Collective: world. Raises: LimeDistError on all."""
    return decide_start(config, device, lambda: resume_folder(config), before_a_switch)


def before_a_switch(config: Config, folder: Path) -> Config:
    resumed = resumed_config(config, folder)
    return evaluated_config(config, folder) if read_meta(folder).step in config.depth.switch_at else resumed


def decide_start(
    config: Config,
    device: torch.device,
    find: Callable[[], Path | None],
    config_at: Callable[[Config, Path], Config],
) -> Start:
    """Rank 0 finds the checkpoint and says with which edges it is used; the others wait until they see the same one.

    Collective: world. Raises: LimeDistError on all ranks.
    """
    told = tell_all(_decision(config, find, config_at) if dist.get_rank() == 0 else None, device)
    if told["error"] is not None:
        raise CheckpointError(told["error"])
    if told["folder"] is None:
        return Start(config, None)
    folder = Path(told["folder"])
    problem = _await_checkpoint(folder, told["digest"])
    if (problems := list(filter(None, gather(problem, device)))) != []:
        raise CheckpointError(problems[0])
    depth = told["depth"]
    pattern = depth["pattern"]
    if isinstance(pattern, dict):  # JSON makes text of the readers
        pattern = {int(reader): sources for reader, sources in pattern.items()}
    return Start(config.with_pattern(pattern, depth["pattern_name"]), folder, told["step"])


def _decision(
    config: Config, find: Callable[[], Path | None], config_at: Callable[[Config, Path], Config]
) -> dict[str, Any]:
    told: dict[str, Any] = {"error": None, "folder": None}
    try:
        folder = find()
        if folder is not None:
            step = read_meta(folder).step
            depth = _pattern_of(config_at(config, folder).depth)
            told |= {"folder": str(folder), "step": step, "depth": depth, "digest": _digest(folder)}
    except LimeDistError as error:
        told["error"] = one_line(error)
    return told


def _pattern_of(depth: DepthConfig) -> dict[str, Any]:
    return {key: value for key, value in asdict(depth).items() if key in ("pattern", "pattern_name")}


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "meta.json").read_bytes()).hexdigest()


def _await_checkpoint(folder: Path, digest: str) -> str | None:
    """What is wrong with `folder` as this host sees it."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (folder / "meta.json").is_file():
        if time.monotonic() > deadline:
            return (
                f"checkpoint {folder}: host {host_name()} does not see it after {VISIBLE_SECONDS:.0f} s, rank 0 does; "
                "put run.dir on storage that all nodes share"
            )
        time.sleep(_POLL_SECONDS)
    if _digest(folder) != digest:
        return f"checkpoint {folder}: host {host_name()} sees another one than rank 0; put run.dir on storage that all nodes share"
    return None


def plan_of(config: Config, known: RunPlan) -> RunPlan:
    """Another one only where the edges are others."""
    return known if known.config == config else plan_run(config)
