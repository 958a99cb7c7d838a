"""How often the host waits for the device in a training step: once, where it reads loss, norm, bytes and stops together.

Seen on the CPU by what would wait on a GPU: every reading of a tensor's values, and every copy from and to the host.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from test_watchdog import write_endless_run
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lime_dist.config import Config, check_config, load_config
from lime_dist.lifecycle.launcher import own_place
from lime_dist.lifecycle.local import run_local
from lime_dist.plan.run_plan import plan_run
from lime_dist.training.run import train

FEW_STEPS, MORE_STEPS = 2, 5  # what lies before, between and behind the steps is the same

# Python's names: what ends in no operation that torch dispatches.
METHODS = frozenset(("tolist", "numpy", "cpu", "tensor", "as_tensor"))
OPERATIONS = frozenset((
    torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
))  # fmt: skip


class HostWaits:
    """Counts, within a `with`, what would make the host wait if all tensors were on a GPU."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._modes = _Methods(self), _Operations(self)

    def __enter__(self) -> HostWaits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def add(self, name: str) -> None:
        if not _is_in_adamw():
            self.counts[name] += 1


def _is_in_adamw() -> bool:
    """Its number of updates, which it reads and counts up, lies on the CPU on a machine with GPUs too."""
    frame = sys._getframe()
    while frame is not None:
        if "/torch/optim/" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


class _Methods(TorchFunctionMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in METHODS:
            self._waits.add(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket in OPERATIONS:
            self._waits.add(operation.overloadpacket.__name__)
        if operation is torch.ops.aten.masked_fill_.Tensor:  # which reads the value that it fills in
            self._waits.add("masked_fill_")
        return operation(*args, **(kwargs or {}))


def count_waits(config: Config) -> Counter[str]:
    with HostWaits() as waits:
        train(plan_run(config), own_place())
    return waits.counts


def waits_of_a_step(config: Config) -> list[dict[str, float]]:
    """By rank."""
    few, more = (
        run_local(
            count_waits,
            config.layout.world_size,
            replace(config, run=replace(config.run, steps=steps, dir=f"{config.run.dir}_{steps}")),
        )
        for steps in (FEW_STEPS, MORE_STEPS)
    )
    return [
        {name: (after[name] - before[name]) / (MORE_STEPS - FEW_STEPS) for name in after if after[name] != before[name]}
        for before, after in zip(few, more, strict=True)
    ]


def make_config(folder: Path, *overrides: str) -> Config:
    config = load_config(
        write_endless_run(folder),
        ["eval.every=0", "checkpoint.every=0", "pipeline.num_microbatches=2", "run.device=cpu", *overrides],
    )
    return check_config(config, config.layout.world_size)


PIPELINE = "parallel.pp=3"
NUM_PARAMETER_GROUPS = 3  # with weight decay, without, and routers


@pytest.mark.parametrize(
    "overrides",
    [
        (PIPELINE, "deepspeed.zero_optimization.stage=0"),
        (PIPELINE, "deepspeed.zero_optimization.stage=1"),
        (PIPELINE, "deepspeed.zero_optimization.stage=0", "run.dtype=bf16"),
        (PIPELINE, "deepspeed.zero_optimization.stage=1", "run.dtype=bf16"),
        ("parallel.dp=2", "deepspeed.zero_optimization.stage=2"),
    ],
)
def test_the_host_waits_once_a_step(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    for waits in waits_of_a_step(make_config(tmp_path, *overrides)):
        assert waits == {"tolist": 1}


def test_under_zero_3_deepspeed_waits_too(tmp_path: Path) -> None:
    """For its own check of the norm, and for a constant for each group of parameters."""
    config = make_config(tmp_path, "parallel.dp=2", "deepspeed.zero_optimization.stage=3")
    for waits in waits_of_a_step(config):
        assert waits == {"tolist": 1, "_local_scalar_dense": 1, "tensor": NUM_PARAMETER_GROUPS}


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda tensor: tensor[0].item(),
    "float": lambda tensor: float(tensor[0]),
    "if": lambda tensor: 1 if tensor[0] > 0 else 0,
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
    "numpy": lambda tensor: tensor.numpy(),
    "equal": lambda tensor: torch.equal(tensor, tensor),
    "a constant": lambda tensor: torch.tensor(1.0, device=tensor.device),
    "DeepSpeed's mask": lambda tensor: tensor.masked_fill_(tensor > 1, tensor[0]),
}


@pytest.mark.parametrize("way", WAITS)
def test_every_way_to_wait_is_seen(way: str) -> None:
    tensor = torch.arange(3.0)
    with HostWaits() as waits:
        tensor.add_(1).sum()
        assert not waits.counts
        WAITS[way](tensor)
    assert waits.counts.total() == 1
