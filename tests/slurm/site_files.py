"""What a test cluster is: its nodes, partitions and clocks, as the text of its configuration files.

Pure data: starts nothing and reads nothing of the machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CONTROLLER, NETWORK, PORT = "ctl", "10.77.0", 17000
# A job of `high` takes the place of jobs of `low`, which SLURM requeues.
LOW_AND_HIGH = (
    "PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    "PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF",
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A cluster's shape. Nodes are called n1, n2, ...; GPUs are character devices that compute nothing."""

    nodes: int = 3
    cpus: int = 4  # for each node; bookkeeping only, nothing is bound
    memory_mib: int = 4000
    gpus: int = 0
    features: str = ""
    partitions: tuple[str, ...] = LOW_AND_HIGH
    slurmd_timeout: int = 10  # seconds; a silent node is DOWN after about 26
    kill_wait: int = 15  # seconds between TERM and KILL

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"n{index}" for index in range(1, self.nodes + 1))

    def address(self, node: str) -> str:
        return f"{NETWORK}.{10 + int(node[1:])}"


def hosts_file(site: Site) -> str:
    lines = ["127.0.0.1 localhost", f"{NETWORK}.1 {CONTROLLER}"]
    return "\n".join(lines + [f"{site.address(node)} {node}" for node in site.node_names]) + "\n"


def gres_conf(site: Site, folder: Path) -> str:
    return f"NodeName=n[1-{site.nodes}] Name=gpu File={folder}/dev/nvidia[0-{site.gpus - 1}]\n" if site.gpus else ""


def slurm_conf(site: Site, folder: Path) -> str:
    """Private ports, sockets and folders; a scheduler that wakes at once; finished jobs stay visible."""
    resources = f"CPUs={site.cpus} RealMemory={site.memory_mib}"
    if site.features:
        resources += f" Feature={site.features}"
    if site.gpus:
        resources += f" Gres=gpu:{site.gpus}"
    nodes = [f"NodeName={node} NodeAddr={site.address(node)} Port={PORT + 1}" for node in site.node_names]
    return "\n".join(
        [
            _SETTINGS.format(folder=folder, controller=f"{CONTROLLER}({NETWORK}.1)", port=PORT, site=site),
            *(["GresTypes=gpu"] if site.gpus else []),
            f"NodeName=DEFAULT {resources} State=UNKNOWN",
            *nodes,
            *site.partitions,
            "",
        ]
    )


# config_overrides: nodes may have more CPUs than the machine. ReturnToService: a node is back when its slurmd is.
_SETTINGS = """\
ClusterName=lab
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,sched_interval=2,bf_interval=2,batch_sched_delay=0
ReturnToService=2
EnforcePartLimits=ALL
SlurmdTimeout={site.slurmd_timeout}
KillWait={site.kill_wait}
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE"""
