"""Facts of one host, read there, and the pure judgement of them. Knows no store and no process group."""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from lime_dist import __version__
from lime_dist.config import Config
from lime_dist.errors import LayoutError
from lime_dist.formats import format_bytes
from lime_dist.lifecycle.launcher import Place, host_name
from lime_dist.plan.table import format_layers

MIN_FREE_GPU_SHARE = 0.9  # less means that another process holds the rest
MIN_HOST_BYTES_PER_RANK = 2**30  # what a rank takes before it holds a model
MAX_CLOCK_SECONDS = 2.0
_SHOWN_CHARACTERS = 300  # of a command line


@dataclass(frozen=True, kw_only=True)
class Gpu:
    uuid: str
    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """What one rank reads for all of its host. file_bytes: of each file of tokens, None where it cannot be read."""

    memory_available: int  # bytes
    leftovers: tuple[str, ...]
    file_bytes: tuple[tuple[str, int | None], ...]
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What a rank brings. `facts` from local rank 0 alone; `problem`: why it has not even read its configuration."""

    host: str
    local_rank: int
    gpu: Gpu | None = None
    facts: HostFacts | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Host:
    """All that is known of a host. problems: what needs no judging. clock: seconds ahead of rank 0's, and the error."""

    name: str
    ranks: tuple[int, ...]
    facts: HostFacts | None
    gpus: tuple[Gpu, ...] = ()
    clock: tuple[float, float] = (0.0, 0.0)
    problems: tuple[str, ...] = ()


# ---- reading


def read_arrival(config: Config, place: Place) -> Arrival:
    facts = read_facts(config) if place.local_rank == 0 else None
    return Arrival(host=host_name(), local_rank=place.local_rank, gpu=read_gpu(config, place), facts=facts)


def read_facts(config: Config) -> HostFacts:
    return HostFacts(
        memory_available=psutil.virtual_memory().available,
        leftovers=tuple(find_leftovers()),
        file_bytes=tuple((str(path), _readable_bytes(path)) for path in _token_files(config)),
        versions=(("torch", version("torch")), ("lime_dist", __version__)),
    )


def read_gpu(config: Config, place: Place) -> Gpu | None:
    """The GPU that this rank will use; None on the CPU, or where there is none for it."""
    import torch

    from lime_dist.training.world import pick_device

    try:
        device = pick_device(config, place.local_rank)
    except LayoutError:
        return None
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(uuid=str(torch.cuda.get_device_properties(device).uuid), free_bytes=free, total_bytes=total)


def _token_files(config: Config) -> list[Path]:
    sources = (*config.data.train, *config.data.valid)
    return [Path(f"{source.path}.{suffix}") for source in sources for suffix in ("bin", "idx")]


def _readable_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size if os.access(path, os.R_OK) else None
    except OSError:
        return None


def find_leftovers() -> list[str]:
    """This user's trainings on this host that nobody watches any more: the launcher that started them has gone.

    Neither ranks of this job nor those of another one that SLURM runs here as well are left over.
    """
    found = (_describe_leftover(process) for process in psutil.process_iter())
    return [text for text in found if text is not None]


def _describe_leftover(process: psutil.Process) -> str | None:
    try:
        arguments = process.cmdline()
        if process.uids().real != os.getuid() or not is_training(arguments) or _is_watched(process):
            return None
    except psutil.Error:
        return None  # it has ended in the meantime
    return f"pid {process.pid}: {textwrap.shorten(' '.join(arguments), _SHOWN_CHARACTERS)}"


def _is_watched(process: psutil.Process) -> bool:
    """What SLURM started has slurmstepd above it; what a person or a tool started has not yet been left to init."""
    parents = [parent.name() for parent in process.parents()]
    if "SLURM_JOB_ID" in process.environ():
        return any(name.startswith("slurmstepd") for name in parents)
    return len(parents) > 1 and parents[0] != "systemd"


_MODULES = ("lime_dist", "lime_dist.cli")
_MODULE_FILES = tuple(f"{module.replace('.', '/')}/__main__.py" for module in _MODULES)


def is_training(arguments: Sequence[str]) -> bool:
    """`python .../lime-dist train ...` or `python -m lime_dist train ...`, which it has in full once it runs; also below torchrun."""
    if not arguments or not Path(arguments[0]).name.startswith("python"):
        return False  # srun and shells have these words too
    return any(
        action == "train"
        and (Path(command).name == "lime-dist" or command in _MODULES or command.endswith(_MODULE_FILES))
        for command, action in zip(arguments, arguments[1:])
    )


# ---- judging


def judge(host: Host, hosts: Sequence[Host], config: Config) -> list[str]:
    """What is wrong with `host`, as most of `hosts` (rank 0's first) are; empty for a good one."""
    facts = host.facts
    if facts is None:
        return list(host.problems) or ["its local rank 0 did not speak for it"]
    return [
        *host.problems,
        *_judge_gpus(host, hosts, config),
        *_judge_memory(host, facts),
        *(f"a training is left over there ({leftover})" for leftover in facts.leftovers),
        *_judge_files(facts, hosts),
        *_judge_versions(facts, hosts),
        *_judge_clock(host, hosts),
    ]


def _judge_gpus(host: Host, hosts: Sequence[Host], config: Config) -> list[str]:
    wanted = config.run.device == "cuda" or (config.run.device == "auto" and any(other.gpus for other in hosts))
    if not wanted:
        return []
    found = len({gpu.uuid for gpu in host.gpus})
    few = [f"{found} GPUs for {len(host.ranks)} ranks"] if found < len(host.ranks) else []
    return few + [
        f"GPU {gpu.uuid} has {format_bytes(gpu.free_bytes)} of {format_bytes(gpu.total_bytes)} free; "
        "end what holds the rest"
        for gpu in host.gpus
        if gpu.free_bytes < MIN_FREE_GPU_SHARE * gpu.total_bytes
    ]


def _judge_memory(host: Host, facts: HostFacts) -> list[str]:
    needed = MIN_HOST_BYTES_PER_RANK * len(host.ranks)
    if facts.memory_available >= needed:
        return []
    return [
        f"{format_bytes(facts.memory_available)} of host memory for {len(host.ranks)} ranks, "
        f"{format_bytes(needed)} needed"
    ]


def _judge_files(facts: HostFacts, hosts: Sequence[Host]) -> list[str]:
    usual = _most_common(((path, size) for path, size in _all(hosts, "file_bytes") if size is not None))
    wrong = []
    for path, size in facts.file_bytes:
        if size is None:
            wrong.append(f"{path} cannot be read there")
        elif size != usual[path]:
            wrong.append(f"{path} has {size} bytes there, {usual[path]} elsewhere")
    return wrong


def _judge_versions(facts: HostFacts, hosts: Sequence[Host]) -> list[str]:
    usual = _most_common(_all(hosts, "versions"))
    return [
        f"{name} {number} is installed there, {usual[name]} elsewhere"
        for name, number in facts.versions
        if number != usual[name]
    ]


def _all(hosts: Sequence[Host], fact: str) -> Iterable[tuple[str, Any]]:
    return (pair for host in hosts if host.facts for pair in getattr(host.facts, fact))


def _most_common(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The most common value of each name; of those that are as common, the first."""
    return {name: value for (name, value), _ in reversed(Counter(pairs).most_common())}


def _judge_clock(host: Host, hosts: Sequence[Host]) -> list[str]:
    """Against the median host: were rank 0's wrong, all others would seem to be. Of two, rank 0's counts."""
    ordered = sorted(other.clock[0] for other in hosts)
    reference = ordered[len(ordered) // 2] if len(ordered) > 2 else 0.0
    ahead, error = host.clock[0] - reference, host.clock[1]
    if abs(ahead) - error <= MAX_CLOCK_SECONDS:
        return []
    return [f"its clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"]


def blame_missing(planned: Mapping[int, str], arrivals: Mapping[int, str], seconds: float) -> dict[str, str]:
    """Hosts whose ranks did not come, each with what is wrong; "" for ranks whose host cannot be known.

    planned: the host of each rank, "" where SLURM does not say. arrivals: the host of each rank that came.
    If of several other hosts none came, it is rank 0's that cannot be reached.
    """
    hosts: dict[str, list[int]] = {}
    for rank, host in planned.items():
        if rank not in arrivals:
            hosts.setdefault(host, []).append(rank)
    others = hosts.keys() - {"", arrivals[0]}
    if len(others) > 1 and set(arrivals.values()) == {arrivals[0]}:
        return {arrivals[0]: f"none of the {len(others)} other hosts reached it within {seconds:.0f} s"}
    return {host: f"{_ranks(ranks)} did not arrive within {seconds:.0f} s" for host, ranks in hosts.items()}


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {format_layers(ranks)}"
