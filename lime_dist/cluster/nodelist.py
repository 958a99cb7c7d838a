"""SLURM's compact lists of hosts, `n[1-3,07],gpu-a`, and the hosts and port that they give a job step. No torch."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Mapping

from lime_dist.errors import LayoutError

_SCONTROL_SECONDS = 10  # without its configuration scontrol tries for a minute
_ITEM = re.compile(r"(?:\[[^\]]*\]|[^,\[\]])+")  # commas separate hosts, but not within brackets
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_TASKS = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def expand_nodelist(text: str, run_scontrol: bool = True) -> list[str]:
    """The hosts of a list, in its order. A form that is not known here is left to `scontrol`, where there is one.

    Not the other way round: a thousand ranks need not start a process each for what most lists are.
    Raises: LayoutError when it is no list of hosts.
    """
    try:
        return _parse(text)
    except LayoutError:
        hosts = _ask_scontrol(text) if run_scontrol else None
        if hosts is None:
            raise
        return hosts


def _ask_scontrol(text: str) -> list[str] | None:
    """None when there is no scontrol or it gives no answer, as within a container that lacks its configuration."""
    command = ["scontrol", "show", "hostnames", text]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split() or None  # its exit code is 0 even where it refuses the list


def _parse(text: str) -> list[str]:
    items = _ITEM.findall(text)
    if ",".join(items) != text.rstrip(","):
        raise _not_a_list(text)
    return [host for item in items for host in _expand_item(item.strip(), text)]


def _expand_item(item: str, text: str) -> list[str]:
    """`gpu[1-2]-[7,9]` is every combination; what stands between brackets stays as it is."""
    parts = re.split(r"\[([^\]]*)\]", item)  # text and the insides of brackets in turn
    choices = [_expand_ranges(part, text) if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _expand_ranges(ranges: str, text: str) -> list[str]:
    """`1-3,07`: the first number's width holds for its range."""
    numbers = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _not_a_list(text)
        first, last = match[1], match[2] or match[1]
        if int(first) > int(last):
            raise _not_a_list(text)
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers


def _not_a_list(text: str) -> LayoutError:
    return LayoutError(f"nodelist: {text!r} is no list of hosts; write it as SLURM does, such as n[1-3],gpu07")


def step_nodelist(environment: Mapping[str, str]) -> str:
    """The compact list of the hosts of this job step, else of the job; empty outside SLURM."""
    return environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")


def planned_hosts(world_size: int, environment: Mapping[str, str] = os.environ) -> dict[int, str]:
    """The host of each rank as SLURM's block distribution places them; "" for all where that cannot be known.

    Raises: LayoutError when SLURM's own variable is no list of hosts.
    """
    hosts = expand_nodelist(step_nodelist(environment))
    tasks = _expand_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if "LOCAL_WORLD_SIZE" in environment:  # torchrun: the step has one task a host, which starts as many ranks on each
        tasks = [int(environment["LOCAL_WORLD_SIZE"])] * len(hosts)
    ranks = [host for host, count in zip(hosts, tasks) for _ in range(count)]
    return dict(enumerate(ranks if len(ranks) == world_size else [""] * world_size))


def _expand_tasks(text: str) -> list[int]:
    """`2(x3),1`: 2, 2, 2, 1."""
    matches = [_TASKS.fullmatch(part) for part in text.split(",")]
    return [int(match[1]) for match in matches if match for _ in range(int(match[2] or 1))]
