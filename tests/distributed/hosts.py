"""Hosts of their own on this machine: network namespaces on one bridge, each with its host name and its /etc/hosts.

Everything lives in a sandbox of namespaces and ends with it. Knows nothing of training.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child=KILL", "--mount-proc")
_SANDBOX = """set -e
folder=$1 count=$2
mount -t tmpfs tmpfs /run
ip link add cluster type bridge
ip link set cluster up
for ((host = 1; host <= count; host++)); do
  ip netns add n$host
  ip link add to-n$host type veth peer name eth0 netns n$host
  ip link set to-n$host master cluster up
  ip -n n$host addr add 10.77.0.$host/24 dev eth0
  ip -n n$host link set lo up
  ip -n n$host link set eth0 up
done
for ((host = 1; host <= count; host++)); do
  nsenter --net=/run/netns/n$host unshare --mount --uts bash "$folder/n$host.sh" >"$folder/n$host.log" 2>&1 &
done
wait
"""
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
    missing = [name for name in ("ip", "ss", "unshare", "nsenter") if not shutil.which(name, path=_PATH)]
    if missing:
        return f"{', '.join(missing)} not installed"
    trial = subprocess.run([*_UNSHARE, "ip", "link", "add", "trial", "type", "bridge"], **_quiet())
    return None if trial.returncode == 0 else f"needs root and Linux namespaces ({trial.stderr.strip()})"


def _quiet() -> dict:
    return {"capture_output": True, "text": True, "env": os.environ | {"PATH": _PATH}}


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
    sandbox = [*_UNSHARE, "bash", "-c", _SANDBOX, "sandbox", str(folder), str(len(commands))]
    checkout = str(Path(__file__).parents[2])
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{_PATH}",
        "PYTHONPATH": checkout,
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(sandbox, env=environment, stdout=sys.stderr) as process:
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return [_ended(folder / name) for name in names]


def _ended(prefix: Path) -> Ended:
    code = prefix.with_suffix(".code")
    lines = prefix.with_suffix(".listening").read_text().splitlines()
    return Ended(
        int(code.read_text()) if code.exists() else None,
        prefix.with_suffix(".log").read_text(),
        {line.split()[3].rpartition(":")[0] for line in lines},
    )
