"""The memory estimate against what torch's allocator hands out on a GPU in a step. Has not run on GPUs yet."""

from __future__ import annotations

import pytest
import torch
from common import make_batches, make_config
from fresh_ranks import on_cpu, on_gpu, run_fresh
from torch import Tensor

from lime_dist.bench.depth import CudaBytes, LiveBytes
from lime_dist.plan.run_plan import plan_run
from lime_dist.training.rank import Rank

SIZES = {
    # A GPU's peak is 2 GiB or more: cuBLAS's workspaces (tens of MiB) and blocks of 512 bytes weigh little.
    "cuda": ("model.num_layers=8", "model.hidden_size=1024", "model.intermediate_size=2816", "model.num_heads=16",
             "model.num_kv_heads=8", "model.vocab_size=8192", "data.seq_length=1024"),
    "cpu": ("model.num_layers=6", "model.hidden_size=64", "model.intermediate_size=160", "model.num_kv_heads=2",
            "data.seq_length=64"),
}  # fmt: skip
# Measured over estimated. Below: buffers that are not there all at once. Above: workspaces, what kernels take for themselves.
BOUNDS = {"cuda": (0.75, 1.15), "cpu": (0.8, 1.2)}


LAYOUTS = ("micro=6 zero=0", "tp=2 sp micro=6", "pp=2 v=2 layers=8 micro=6", "pp=4 tp=2 sp micro=12")


def peaks(rank: Rank, batch: Tensor) -> tuple[int, int | None]:
    """Bytes in a step over those that last between steps; on a GPU all that the allocator has handed out, too.

    Of the second step, when all lasting buffers are there.
    """
    rank.train_step(batch, 1.0)
    with CudaBytes() if rank.device.type == "cuda" else LiveBytes() as memory:
        rank.train_step(batch, 1.0)
        return memory.peak, torch.cuda.max_memory_allocated() if rank.device.type == "cuda" else None


@pytest.mark.parametrize(("text", "device"), [*on_gpu(*LAYOUTS, "pp=2 gpipe micro=3"), on_cpu("pp=2 gpipe micro=3")])
def test_the_estimate_is_near_the_peak(text: str, device: str) -> None:
    config = make_config(f"bf16 {text}", *SIZES[device], f"run.device={device}")
    low, high = BOUNDS[device]
    for rank, (step, total) in enumerate(run_fresh(config, peaks, make_batches(config, 1)[0])):
        estimate = plan_run(config).memory[config.layout.coordinate(rank).pp_rank]
        assert low < step / (estimate.total_bytes - estimate.weights - estimate.optimizer) < high
        assert total is None or low < total / estimate.total_bytes < high
