"""Ranks that may use CUDA: fresh interpreters, as a fork of a process that has asked for it cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from lime_dist.config import Config
from lime_dist.lifecycle.local import run_local
from lime_dist.lifecycle.wire import find, name_of
from lime_dist.testing import on_rank


def on_gpu(*texts: str) -> list[ParameterSet]:
    """Cases (layout, device) of a test."""
    return [pytest.param(text, "cuda", marks=pytest.mark.gpu) for text in texts]


def on_cpu(text: str) -> ParameterSet:
    """The same test over gloo, so that it is known to work but for the device."""
    return pytest.param(text, "cpu", marks=pytest.mark.slow)


def run_fresh(config: Config, work: Callable[..., Any], *args: Any) -> list[Any]:
    """As `testing.run_ranks`; `work` is a module's own function, and what `wire` can pack may be an argument."""
    layout = config.layout
    return run_local(
        work_on_rank,
        layout.world_size,
        config,
        name_of(work),
        *args,
        describe=lambda rank: str(layout.coordinate(rank)),
        fresh=True,
    )


def work_on_rank(config: Config, name: str, *args: Any) -> Any:
    importlib.import_module(name.partition(":")[0])
    return on_rank(config, find(name), *args)
