"""A name, an /etc/hosts and processes of its own for each of the bench's hosts, which have but a network card.

Everything lives in a sandbox of namespaces a host and ends with it. Knows nothing of training.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lime_dist.bench.hosts import Host, hosts, why_no_hosts

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_UNSHARE = ("unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc")
# What listens there is the command's: nothing else runs on this host.
_HOST = """mount --bind {folder}/{name}.hosts /etc/hosts && hostname {name}
while :; do ss --listening --tcp --numeric --no-header; sleep 0.1; done >{folder}/{name}.listening &
sampler=$!
export LC_ALL=C {environment}
{command}
code=$?
kill $sampler
echo $code >{folder}/{name}.code
"""


def why_not_here() -> str | None:
    """Why no hosts can be made on this machine, or None."""
    missing = [name for name in ("ss", "unshare") if not shutil.which(name, path=_PATH)]
    if missing:
        return f"{', '.join(missing)} not installed"
    if (reason := why_no_hosts()) is not None:
        return reason
    environment = os.environ | {"PATH": _PATH}
    trial = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, env=environment)
    return None if trial.returncode == 0 else f"needs root and Linux namespaces ({trial.stderr.strip()})"


@dataclass(frozen=True)
class Ended:
    """listening: the addresses, without ports, on which anything on the host ever listened."""

    code: int | None  # None: it was still running
    output: str
    listening: set[str]


def run_on_hosts(
    folder: Path,
    hosts_files: Sequence[str],
    commands: Sequence[str],
    variables: Sequence[Mapping[str, str]],
    timeout: float,
) -> list[Ended]:
    """Run a line of bash each on n1, n2, ... (10.77.0.1, ...), all at once; `folder`: for files of its own. `timeout`: seconds."""
    folder.mkdir()
    names = [f"n{index}" for index in range(1, 1 + len(commands))]
    for name, hosts_file, command, values in zip(names, hosts_files, commands, variables, strict=True):
        (folder / f"{name}.hosts").write_text(hosts_file)
        environment = " ".join(f"{key}='{value}'" for key, value in values.items())
        script = _HOST.format(folder=folder, name=name, environment=environment, command=command)
        (folder / f"{name}.sh").write_text(script)
    with hosts(len(commands)) as made, ExitStack() as stack:
        processes = [stack.enter_context(_begin(host, folder / name)) for host, name in zip(made, names, strict=True)]
        _wait(processes, timeout)
    return [_ended(folder / name) for name in names]


def _begin(host: Host, prefix: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    with prefix.with_suffix(".log").open("w") as log:
        script = [*_UNSHARE, "bash", str(prefix.with_suffix(".sh"))]
        return subprocess.Popen(script, env=environment, stdout=log, stderr=log, preexec_fn=host.enter)


def _wait(processes: Sequence[subprocess.Popen[bytes]], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()


def _ended(prefix: Path) -> Ended:
    code = prefix.with_suffix(".code")
    lines = prefix.with_suffix(".listening").read_text().splitlines()
    return Ended(
        int(code.read_text()) if code.exists() else None,
        prefix.with_suffix(".log").read_text(),
        {line.split()[3].rpartition(":")[0] for line in lines},
    )
