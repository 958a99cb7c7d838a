"""Cluster files: defaults, and what is refused by which line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lime_dist.cluster.schema import load_cluster, parse_time
from lime_dist.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text("nodes: 2\ngpus_per_node: 4\ntime: 12:00:00\n")
    return path


def test_defaults(file: Path) -> None:
    cluster = load_cluster(file)
    assert (cluster.ranks_per_node, cluster.world_size, cluster.time_seconds) == (4, 8, 43200)
    assert (cluster.launcher, cluster.requeue, cluster.preflight) == ("srun", "requeue", True)


def test_overrides(file: Path) -> None:
    cluster = load_cluster(
        file, ["cluster.time=02:00:00", "cluster.nodes=4", "cluster.container.image=x.sif", "cluster.memory=0"]
    )
    assert (cluster.time, cluster.nodes, cluster.container.image, cluster.memory) == ("02:00:00", 4, "x.sif", 0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    {
        "90": 5400, "10:30": 630, "12:00:00": 43200, "1-0": 86400, "2-12": 216000, "1-12:30": 131400,
        "1-00:00:01": 86401, "0": 0, "": 0, "1:2:3:4": 0, "1h": 0, "-5": 0, "UNLIMITED": 0,
    }.items(),
)  # fmt: skip
def test_time(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


MISTAKES = {
    "cluster.nodse=2": r"cluster\.nodse: unknown key; did you mean nodes\?",
    "cluster.container.imgae=x": r"cluster\.container\.imgae: unknown key; did you mean image\?",
    "cluster.container.python=x": r"cluster\.container\.image: missing; add it",
    "cluster.nodes=many": r"cluster\.nodes: 'many' is not a whole number",
    "cluster.nodes=0": r"cluster\.nodes: 0 must be at least 1",
    "cluster.gpus_per_node=0": r"cluster\.tasks_per_node: None with gpus_per_node=0; set it to at least 1",
    "cluster.time=soon": r"cluster\.time: 'soon' is no time; write 12:00:00",
    "cluster.stop_lead_seconds=43200": r"cluster\.stop_lead_seconds: 43200 must be below cluster\.time",
    "cluster.stop_lead_seconds=0": r"cluster\.stop_lead_seconds: 0 must be at least 1",
    "cluster.gpu_memory=much": r"cluster\.gpu_memory: 'much' is no size; write 80GiB",
    "cluster.launcher=mpirun": r"cluster\.launcher: 'mpirun' is unknown; use srun or torchrun",
    "cluster.requeue=always": r"cluster\.requeue: 'always' is unknown; use requeue or chain or never",
    "cluster.gpu_request=all": r"cluster\.gpu_request: 'all' is unknown; use gres or",
    "cluster.container={image: x, runtime: docker}": r"cluster\.container\.runtime: 'docker' is unknown; use pyxis or",
    "cluster.container={image: x, mounts: [/a]}": r"cluster\.container\.mounts\[0\]: '/a' must be host:container",
    "cluster.partition=a b": r"cluster\.partition: 'a b' has characters that SLURM does not take here",
    "cluster.sbatch_flags=[-N2]": r"cluster\.sbatch_flags: '-N2' must be --name or --name=value",
    "cluster.sbatch_flags=[--time=1]": r"cluster\.sbatch_flags: --time is set from cluster\.time; remove it and set that",
    "cluster.sbatch_flags=[--wra=ls]": r"cluster\.sbatch_flags: '--wra=ls' is not among the flags known to run no program",
    "cluster.srun_flags=[--task-prolog=x]": r"cluster\.srun_flags: '--task-prolog=x' is not among .* under cluster\.setup",
    "cluster.srun_flags=[--mpi=../x]": r"cluster\.srun_flags: '--mpi=\.\./x' is not among",
    "cluster.srun_flags=[--begin=now]": r"cluster\.srun_flags: '--begin=now' is not among",
    "cluster.export={BASH_ENV: x}": r"cluster\.export: BASH_ENV is not among the variables .*; set it under cluster\.setup",
    "cluster.export={a-b: x}": r"cluster\.export: 'a-b' is no name of a variable; use letters",
    "cluster.sbatch_flags=[--nodelist=/etc/hosts]": r"cluster\.sbatch_flags: '--nodelist=/etc/hosts' is not among the flags",
    "cluster.srun_flags=[--nodelist=./n]": r"cluster\.srun_flags: '--nodelist=\./n' is not among the flags",
    "cluster.export={LC_ALL: /tmp/x}": r"cluster\.export: LC_ALL is not among the variables",
    "cluster.modules=[gcc/../../tmp/x]": r"cluster\.modules\[0\]: 'gcc/\.\./\.\./tmp/x' is no name of a module",
    "cluster.modules=[--force]": r"cluster\.modules\[0\]: '--force' is no name of a module",
    'cluster.setup=["a\\nb"]': r"cluster\.setup\[0\]: 'a\\nb' holds the control character '\\n'; remove it",
}


@pytest.mark.parametrize(("override", "said"), MISTAKES.items())
def test_mistakes(file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}"):
        load_cluster(file, [override])


def test_not_a_cluster_file(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- nodes\n")
    with pytest.raises(ConfigError, match=r"cluster file .*list\.yaml: must hold keys such as `nodes:`"):
        load_cluster(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"cluster file .*none\.yaml: No such file .*; give the path of a YAML file"):
        load_cluster(tmp_path / "none.yaml")


LOADING = (
    "OPENSSL_CONF NCCL_NET_PLUGIN NCCL_TUNER_PLUGIN NCCL_PROFILER_PLUGIN NCCL_CONF_FILE NCCL_TOPO_FILE NCCL_CUDA_PATH "
    "NCCL_DEBUG_FILE TORCH_NCCL_DEBUG_INFO_PIPE_FILE CUDA_INJECTION64_PATH CXX CC NVCC_PREPEND_FLAGS CUDA_HOME LD_PRELOAD "
    "LD_LIBRARY_PATH LD_AUDIT PATH PYTHONPATH PYTHONSTARTUP BASH_ENV ENV GCONV_PATH LOCPATH TMPDIR HOME TRITON_CACHE_DIR "
    "TORCH_EXTENSIONS_DIR FI_PROVIDER_PATH UCX_MODULE_DIR UCX_GDB_COMMAND OMP_TOOL_LIBRARIES OMP_TOOL SLURM_CONF "
    "LIME_DIST_OUTCOME_FILE PDSH_RCMD_TYPE BASH_FUNC_srun TZ NCCL_RAS_ADDR NCCL_COMM_ID NCCL_PROXY_PROFILE RDMAV_DRIVERS MKL_RT XDG_CACHE_HOME IFS nccl_debug"
).split()
PLAIN = (
    "NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA NCCL_IB_TIMEOUT NCCL_NET_GDR_LEVEL NCCL_P2P_DIRECT_DISABLE NCCL_CROSS_NIC "
    "TORCH_NCCL_ASYNC_ERROR_HANDLING GLOO_SOCKET_IFNAME OMP_NUM_THREADS MASTER_ADDR MASTER_PORT CUDA_VISIBLE_DEVICES "
    "CUDA_DEVICE_MAX_CONNECTIONS PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF TORCH_DISTRIBUTED_DEBUG FI_PROVIDER "
    "FI_CXI_DISABLE_HOST_REGISTER HF_HUB_OFFLINE LANG LC_ALL"
).split()


@pytest.mark.parametrize("name", LOADING)
def test_no_variable_that_loads_or_runs_anything(file: Path, name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^cluster\.export: {name} is not among .*; set it under cluster\.setup, whose"
    ):
        load_cluster(file, [f"cluster.export={{{name}: /tmp/x}}"])


def test_plain_variables(file: Path) -> None:
    assert list(load_cluster(file, [f"cluster.export={{{': 1, '.join(PLAIN)}: 1}}"]).export) == PLAIN
