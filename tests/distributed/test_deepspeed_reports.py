"""What DeepSpeed's own keys report of a run: `docs/profiling.md` says this and no more."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
from common import make_batches, make_config
from torch import Tensor

from lime_dist.plan.run_plan import plan_run
from lime_dist.testing import run_ranks
from lime_dist.training.rank import Rank

COMMS_LOGGER = "deepspeed.comms_logger={enabled: true, verbose: true, prof_all: true}"


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def take_steps(rank: Rank, batches: list[Tensor]) -> list[str]:
    """What DeepSpeed logs of them."""
    messages = Messages()
    logging.getLogger("DeepSpeed").addHandler(messages)
    for batch in batches:
        rank.train_step(batch, 1.0)
    return messages.texts


def logged_operations(layout: str, *overrides: str) -> set[str]:
    config = make_config(layout, COMMS_LOGGER, *overrides)
    texts = run_ranks(config, take_steps, make_batches(config))[0]
    return {found[1] for text in texts if (found := re.search(r"comm op: (\w+)", text))}


def test_comms_logger_sees_deepspeeds_own_collectives_only() -> None:
    """Neither what the stages send each other nor what megatron-core exchanges in the tensor group."""
    assert logged_operations("pp=2 tp=2 micro=3", "deepspeed.log_level=info") == {"all_reduce"}, "of one replica"
    assert logged_operations("pp=2 dp=2 zero=0", "deepspeed.log_level=info") == set()
    found = logged_operations("pp=2 dp=2 micro=3", "deepspeed.log_level=info")
    assert found == {"all_reduce", "all_gather_into_tensor"}


def test_deepspeed_is_silent_unless_asked() -> None:
    assert logged_operations("pp=2 dp=2") == set()


def test_flops_profiler_counts_the_forward_pass_of_one_microbatch(tmp_path: Path) -> None:
    """And some operations that are no matrix products, which the plan leaves out."""
    profiler = f"{{enabled: true, detailed: false, output_file: {tmp_path / 'report'}}}"
    config = make_config("dp=2 zero=2 micro=3", f"deepspeed.flops_profiler={profiler}")
    run_ranks(config, take_steps, make_batches(config))
    (counted,) = re.findall(r"fwd flops per GPU: +([\d.]+) M", (tmp_path / "report").read_text())
    tokens = config.microbatch_size * config.data.seq_length
    planned = sum(chunk.flops.total for chunk in plan_run(config).chunks)
    assert float(counted) * 1e6 == pytest.approx(tokens * planned, rel=0.1)
