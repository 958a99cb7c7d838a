"""What DeepSpeed's own keys report of a run: `docs/profiling.md` says this and no more."""

from __future__ import annotations

import re

import pytest
from common import make_batches, make_config
from torch import Tensor

from lime_dist.plan.run_plan import plan_run
from lime_dist.testing import run_ranks
from lime_dist.training.rank import Rank

COMMS_LOGGER = "deepspeed.comms_logger={enabled: true, verbose: true, prof_all: true}"


def take_steps(rank: Rank, batches: list[Tensor]) -> None:
    for batch in batches:
        rank.train_step(batch, 1.0)


def said(capfd: pytest.CaptureFixture[str], layout: str, *overrides: str) -> str:
    config = make_config(layout, *overrides)
    run_ranks(config, take_steps, make_batches(config))
    captured = capfd.readouterr()
    return captured.out + captured.err


def test_comms_logger_sees_deepspeeds_own_collectives_only(capfd: pytest.CaptureFixture[str]) -> None:
    """Neither what the stages send each other nor what megatron-core exchanges in the tensor group."""
    report = said(capfd, "pp=2 tp=2 micro=3", COMMS_LOGGER, "deepspeed.log_level=info")
    assert set(re.findall(r"comm op: (\w+)", report)) == {"broadcast", "all_reduce"}
    assert "comm op: all_gather_into_tensor" in said(capfd, "pp=2 dp=2", COMMS_LOGGER, "deepspeed.log_level=info")


def test_deepspeed_is_silent_unless_asked(capfd: pytest.CaptureFixture[str]) -> None:
    assert "comm op" not in said(capfd, "pp=2 dp=2", COMMS_LOGGER)


def test_flops_profiler_reports_one_microbatch(capfd: pytest.CaptureFixture[str]) -> None:
    report = said(capfd, "dp=2 zero=2 micro=3", "deepspeed.flops_profiler.enabled=true")
    assert "DeepSpeed Flops Profiler" in report
    (operations,) = re.findall(r"fwd flops per GPU: +([\d.]+) M", report)
    one_microbatch_flops = forward_flops("dp=2 zero=2 micro=3")
    assert float(operations) * 1e6 == pytest.approx(one_microbatch_flops, rel=0.1)


def forward_flops(layout: str) -> int:
    config = make_config(layout)
    tokens = config.microbatch_size * config.data.seq_length
    return tokens * plan_run(config).model_flops_per_token // 3
