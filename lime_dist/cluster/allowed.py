"""Which variables and flags a cluster file may set: those known to run no program and to load no library or file.

Whoever copies a cluster file from somebody else need read only what it says under `setup`, `python` and `container`.
"""

from __future__ import annotations

import re

# All of NCCL's, libfabric's and the like, but for those that name a plugin, a library or a file.
_FAMILIES = re.compile(
    r"(NCCL|TORCH_NCCL|GLOO_SOCKET|OMP|FI_CXI|FI_EFA|LC)_[A-Z0-9_]+|NVIDIA_TF32_OVERRIDE|FI_PROVIDER"
    r"|CUDA_(DEVICE_MAX_CONNECTIONS|DEVICE_ORDER|LAUNCH_BLOCKING|MODULE_LOADING|VISIBLE_DEVICES)"
    r"|(MKL|OPENBLAS|NUMEXPR)_NUM_THREADS|MASTER_ADDR|MASTER_PORT|LANG|UCX_(TLS|NET_DEVICES)"
    r"|PYTORCH_(CUDA_)?ALLOC_CONF|TORCH_(DISTRIBUTED_DEBUG|CPP_LOG_LEVEL|SHOW_CPP_STACKTRACES)|HF_HUB_OFFLINE"
)
_LOADING = re.compile(
    r"PLUGIN|(^|_)(FILE|PATH|DIR|LIB|LIBRARY|LIBRARIES|CONFIG|PIPE|TOOL|ENV|PROFILE)(_|$)|^NCCL_(CONF_|RAS_|COMM_ID$)"
)
_PATHS = re.compile(r"LANG|LC_.*")  # a value with a slash in it names a file


def may_export(name: str, value: object) -> bool:
    is_path = _PATHS.fullmatch(name) is not None and "/" in str(value)
    return bool(_FAMILIES.fullmatch(name)) and not _LOADING.search(name) and not is_path


# By their whole names; with `=`: with this value only.
_OF_BOTH = (
    "--acctg-freq", "--comment", "--contiguous", "--core-spec", "--cores-per-socket", "--cpu-freq", "--cpus-per-gpu",
    "--exclusive", "--extra-node-info", "--gpu-bind", "--gpu-freq", "--gpus", "--gpus-per-socket", "--gpus-per-task",
    "--hint", "--licenses", "--mem-bind", "--mem-per-cpu", "--mem-per-gpu", "--network", "--nodelist",
    "--ntasks-per-core", "--ntasks-per-gpu", "--ntasks-per-socket", "--overcommit", "--profile", "--propagate",
    "--quiet", "--sockets-per-node", "--spread-job", "--switches", "--thread-spec", "--threads-per-core", "--tmp",
    "--tres-bind", "--tres-per-task", "--use-min-nodes", "--verbose", "--wckey",
)  # fmt: skip
_OF_SBATCH = (
    "--begin", "--cluster-constraint", "--deadline", "--delay-boot", "--hold", "--mail-type", "--mail-user", "--mincpus",
    "--nice", "--no-kill", "--oversubscribe", "--prefer", "--priority", "--time-min",
)  # fmt: skip
_OF_SRUN = (
    "--accel-bind", "--cpu-bind", "--exact", "--no-container-entrypoint", "--no-container-mount-home",
    "--container-mount-home", "--container-readonly", "--container-remap-root", "--container-writable",
    "--no-container-remap-root", "--mpi=none", "--mpi=pmi2", "--mpi=pmix", "--overlap", "--resv-ports", "--slurmd-debug",
    "--unbuffered",
)  # fmt: skip
_FLAGS = {"sbatch_flags": {*_OF_BOTH, *_OF_SBATCH}, "srun_flags": {*_OF_BOTH, *_OF_SRUN}}

# Flags that the other keys of the cluster file own, with their keys.
OWNED_FLAGS = {
    "--nodes": "nodes", "--ntasks": "tasks_per_node", "--ntasks-per-node": "tasks_per_node", "--time": "time",
    "--cpus-per-task": "cpus_per_task", "--mem": "memory", "--partition": "partition", "--account": "account",
    "--qos": "qos", "--constraint": "constraint", "--reservation": "reservation", "--job-name": "job_name",
    "--gres": "gpus_per_node and gpu_type", "--gpus-per-node": "gpus_per_node and gpu_type", "--requeue": "requeue",
    "--no-requeue": "requeue", "--signal": "stop_lead_seconds", "--exclude": "exclude_file", "--export": "export",
    "--container-image": "container", "--container-mounts": "container", "--container-workdir": "container",
}  # fmt: skip


def may_pass(key: str, flag: str) -> bool:
    """key: sbatch_flags or srun_flags; flag: --name or --name=value."""
    name, _, value = flag.partition("=")
    names_file = name == "--nodelist" and "/" in value  # else SLURM takes it for the name of a file with the nodes
    return not {flag, name}.isdisjoint(_FLAGS[key]) and not names_file
