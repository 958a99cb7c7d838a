"""A real SLURM cluster on this machine: every node a host of its own, all of it inside one throw-away sandbox.

Owns the daemons, the network and the failures of nodes; knows nothing of training.

The sandbox is a set of Linux namespaces (net, pid, mount, uts, ipc) held by one shell that waits for the end of its
stdin. However the tests end, that shell ends, and with it the kernel ends every daemon, job and link. A node is a
namespace within it: switching it off kills all of its processes in one moment. Files are shared by all. The bench's hosts
(`lime_dist/bench/hosts.py`) would not do: nodes are found by name, by commands that enter them at any time, and come back.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from site_files import CONTROLLER, NETWORK, Site, gres_conf, hosts_file, slurm_conf

DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
SYSTEM_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
POLL_SECONDS = 0.2
_UNSHARE = ("unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child=KILL", "--mount-proc")
# The address beside 127.0.0.1: with that one alone getaddrinfo(AI_ADDRCONFIG) refuses every IPv4 address.
_SANDBOX = """set -e
mount -t tmpfs tmpfs /run
mount --bind "$1/etc/hosts" /etc/hosts
hostname {controller}
ip link set lo up
ip link add cluster type bridge
ip addr add {network}.1/24 dev cluster
ip link set cluster up
echo ready
read -r _
"""
# PID 1 of a node is not slurmd, so that slurmd can die alone; a shell that waits also reaps orphans.
_NODE = """hostname "$1" && slurmd -N "$1" && echo ready; while :; do sleep 3600; done"""


def why_not_here() -> str | None:
    """Why no cluster can be started on this machine, or None."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=SYSTEM_PATH)]
    if missing:
        return f"SLURM is not installed (no {', '.join(missing)})"
    trial = subprocess.run([*_UNSHARE, "--net", "--ipc", "ip", "link", "add", "trial", "type", "bridge"], **_quiet())
    return None if trial.returncode == 0 else f"needs root and Linux namespaces ({trial.stderr.strip()})"


def _quiet() -> dict:
    return {"capture_output": True, "text": True, "env": os.environ | {"PATH": SYSTEM_PATH}}


@dataclass(frozen=True)
class Process:
    pid: int  # as this machine counts, not the sandbox
    node: str  # or the controller's host
    command: str

    def kill(self) -> None:
        psutil.Process(self.pid).kill()


class ClusterError(RuntimeError):
    """What was waited for has not come; the message ends with the newest lines of the logs."""


class Cluster:
    """Use as a context: `with Cluster.start(folder, Site(nodes=2)) as cluster:`."""

    def __init__(self, folder: Path, site: Site):
        """folder: absolute, private, short enough for a socket in it (under 90 characters)."""
        self.folder, self.site = folder, site
        self._nodes: dict[str, subprocess.Popen] = {}
        self._holder: subprocess.Popen | None = None

    @classmethod
    def start(cls, folder: Path, site: Site = Site()) -> Cluster:  # noqa: B008
        """All nodes idle. Raises: ClusterError."""
        cluster = cls(folder, site)
        try:
            cluster._write_files()
            cluster._open_sandbox()
            cluster._start_controller()
            for node in site.node_names:
                cluster._connect(node)
                cluster.power_on(node)
            cluster.wait_for_nodes(site.node_names, "idle")
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """At once and without a trace, but for the files."""
        if self._holder is not None:
            self._holder.kill()  # takes the sandbox with it
        for process in (self._holder, *self._nodes.values()):
            if process is not None:
                process.communicate()

    # ---- commands inside

    @property
    def environment(self) -> dict[str, str]:
        """What a user's shell has on this cluster: its own PATH, the checkout under test, one thread a rank."""
        checkout = str(Path(__file__).parents[2])
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return kept | {
            "SLURM_CONF": f"{self.folder}/etc/slurm.conf",
            "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
            "PYTHONPATH": checkout,
            "OMP_NUM_THREADS": "1",
        }

    def run(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run on the controller's host. Raises: CalledProcessError (with `check`); code 124 is a timeout (seconds)."""
        result = subprocess.run(
            self._inside(["timeout", "--kill-after=5", str(timeout), *command]),
            cwd=cwd or self.folder,
            env=self.environment | dict(env or {}),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if check and result.returncode != 0:
            raise ClusterError(f"{' '.join(command)}: code {result.returncode}\n{result.stdout}{result.stderr}")
        return result

    def _inside(self, command: Sequence[str], target: int | None = None) -> list[str]:
        """The command within the sandbox, or within the node whose first process is `target`; in the caller's folder."""
        return ["nsenter", f"--target={target or _only_child(self._holder.pid)}", "--all", "--wd=.", *command]

    def sbatch(self, *arguments: str, cwd: Path | None = None) -> int:
        """Submit; the job's id."""
        return int(self.run(["sbatch", "--parsable", *arguments], cwd=cwd).stdout.strip())

    def cancel(self, job_id: int) -> None:
        self.run(["scancel", str(job_id)])

    # ---- jobs

    def job(self, job_id: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        return parse_fields(self.run(["scontrol", "show", "job", str(job_id), "-o"]).stdout)

    def state(self, job_id: int) -> str:
        return self.job(job_id)["JobState"]

    def wait_for(self, job_id: int, states: Collection[str] = ENDED, timeout: float = 120) -> dict[str, str]:
        """The job once it is in one of the states. Raises: ClusterError after `timeout` seconds."""

        def arrived() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] in states else None

        return self.wait_until(arrived, f"job {job_id} in {', '.join(states)}", job_id=job_id, timeout=timeout)

    def wait_until(self, poll: Callable, what: str, *, job_id: int | None = None, timeout: float = 120):
        """The first true answer of `poll`. Raises: ClusterError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not (answer := poll()):
            if time.monotonic() > deadline:
                raise ClusterError(f"after {timeout} s not there: {what}\n{self._logs(job_id)}")
            time.sleep(POLL_SECONDS)
        return answer

    def _logs(self, job_id: int | None) -> str:
        paths = [self.folder / "log" / "slurmctld.log"]
        facts = ""
        if job_id is not None:
            job = self.job(job_id)
            paths.append(Path(job.get("StdOut", "")))
            facts = f"{job}\n"
        return facts + "\n".join(f"--- {path}\n{_tail(path)}" for path in paths if path.is_file())

    # ---- nodes

    def node_state(self, node: str) -> str:
        """One of sinfo's long words, such as idle, mixed, down, completing; `*`: the node does not answer."""
        return self.run(["sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%T"]).stdout.split()[0]

    def wait_for_nodes(self, nodes: Sequence[str], state: str, timeout: float = 60) -> None:
        self.wait_until(
            lambda: all(self.node_state(node) == state for node in nodes), f"{nodes} {state}", timeout=timeout
        )

    def power_on(self, node: str) -> None:
        command = [*_UNSHARE, "bash", "-c", _NODE, "node", node]
        network = ["nsenter", f"--net=/run/netns/{node}"]
        self._nodes[node] = self._hold([*self._inside(network), *command])

    def power_off(self, node: str) -> None:
        """The node's slurmd, and every process of every job on it, die in one moment."""
        psutil.Process(self._first_process(node)).kill()
        self._nodes.pop(node).communicate()

    def kill_slurmd(self, node: str) -> None:
        """slurmd alone dies; the jobs' processes go on without it."""
        (slurmd,) = self.processes(rf"^(\S*/)?slurmd -N {node}$")
        slurmd.kill()

    def start_slurmd(self, node: str) -> None:
        """Again, after `kill_slurmd`."""
        command = self._inside(["slurmd", "-N", node], self._first_process(node))
        subprocess.run(command, env=self.environment, check=True, timeout=20)

    def cut_off(self, node: str) -> None:
        """The node's link goes down; its processes go on."""
        self.run(["ip", "link", "set", f"to-{node}", "down"])

    def join(self, node: str) -> None:
        """The link is up again, after `cut_off`."""
        self.run(["ip", "link", "set", f"to-{node}", "up"])

    def make_read_only(self, node: str, folder: Path) -> None:
        """As this node sees it; the others go on writing."""
        self._mount(node, "mount", "--bind", str(folder), str(folder))
        self._mount(node, "mount", "--options=remount,bind,ro", str(folder))

    def make_writable(self, node: str, folder: Path) -> None:
        """Again, after `make_read_only`."""
        self._mount(node, "umount", str(folder))

    def _mount(self, node: str, *command: str) -> None:
        subprocess.run(self._inside(command, self._first_process(node)), check=True, timeout=20)

    def limit_rate(self, node: str, rate: str) -> None:
        """rate: as tc says it, such as 100mbit; in both directions of the node's link."""
        queue = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        self.run(["tc", "qdisc", "replace", "dev", f"to-{node}", *queue])
        self.run(["tc", "-n", node, "qdisc", "replace", "dev", "eth0", *queue])

    def _first_process(self, node: str) -> int:
        return _only_child(
            _only_child(self._nodes[node].pid)
        )  # nsenter enters a PID namespace by forking, then unshare

    def processes(self, pattern: str) -> list[Process]:
        """Those of the cluster, and of no one else, whose command line matches the regular expression."""
        return [process for process in self._all_processes() if re.search(pattern, process.command)]

    def _all_processes(self) -> Iterator[Process]:
        """Nodes share the sandbox's ipc namespace and have an uts namespace (host name) each."""
        sandbox = _namespace(_only_child(self._holder.pid), "ipc")
        hosts = {_namespace(self._first_process(node), "uts"): node for node in self._nodes}
        for process in psutil.process_iter():
            try:
                if _namespace(process.pid, "ipc") == sandbox:
                    node = hosts.get(_namespace(process.pid, "uts"), CONTROLLER)
                    yield Process(process.pid, node, " ".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue  # it has gone meanwhile

    # ---- starting

    def _write_files(self) -> None:
        for name in ("etc", "munge", "state", "log", "run", "dev", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text(slurm_conf(self.site, self.folder))
        (etc / "hosts").write_text(hosts_file(self.site))
        for index in range(self.site.gpus):
            (self.folder / "dev" / f"nvidia{index}").symlink_to(("/dev/null", "/dev/zero", "/dev/full")[index % 3])
        if self.site.gpus:
            (etc / "gres.conf").write_text(gres_conf(self.site, self.folder))
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)

    def _open_sandbox(self) -> None:
        script = _SANDBOX.format(controller=CONTROLLER, network=NETWORK)
        self._holder = self._hold([*_UNSHARE, "--net", "--ipc", "bash", "-c", script, "sandbox", str(self.folder)])

    def _hold(self, command: list[str]) -> subprocess.Popen:
        """Start what lives as long as the cluster, or its node; returns when it says that it is ready."""
        process = subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log" / "held.log").open("a"),
            text=True,
        )
        if process.stdout.readline().strip() != "ready":
            process.kill()
            raise ClusterError(f"{' '.join(command)}\n{_tail(self.folder / 'log' / 'held.log')}")
        return process

    def _start_controller(self) -> None:
        munge = self.folder / "munge"
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.run(["munged", "--force", *(f"--{option}={munge / name}" for option, name in names.items())])
        self.run(["slurmctld", "-c"])

    def _connect(self, node: str) -> None:
        """A network namespace of the node's name, with a link to the bridge."""
        self.run(["ip", "netns", "add", node])
        self._ip(
            f"link add to-{node} type veth peer name eth0 netns {node}",
            f"link set to-{node} master cluster up",
        )
        self._ip(f"addr add {self.site.address(node)}/24 dev eth0", "link set lo up", "link set eth0 up", node=node)

    def _ip(self, *lines: str, node: str | None = None) -> None:
        where = ["-n", node] if node else []
        for line in lines:
            self.run(["ip", *where, *line.split()])


def parse_fields(text: str) -> dict[str, str]:
    """`KEY=VALUE KEY=VALUE ...`, as scontrol prints with -o; a value may hold spaces."""
    return dict(re.findall(r"(\S+?)=(.*?)(?=\s+[\w/:]+=|\s*$)", text.strip()))


def _only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def _namespace(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def _tail(path: Path, count: int = 25) -> str:
    with path.open(errors="replace") as file:
        return "".join(deque(file, count))
