"""One GPU a rank over NCCL gives the numbers of the plain single process on the CPU. Has not run on GPUs yet.

The words of a layout are those of `common.SHORT`.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from common import assert_equals_the_single_process, make_config, overrides, run_layout, run_plain
from fresh_ranks import on_cpu, on_gpu, run_fresh
from test_bf16 import LOSS_TOLERANCE, TENSOR_TOLERANCE, far_off

from lime_dist.training.parity import run_parity

GOLDEN = Path(__file__).parents[1] / "golden" / "mha4"
TIMEOUT = timedelta(seconds=250)
# fp32 on both sides (torch leaves TF32 off). Kernels sum in other orders than a CPU's and have an exp of their own; layouts
# on the CPU differ by 1e-6. Anything forgotten, counted twice or scaled wrongly is far above.
TOLERANCE = 1e-4

LAYOUTS = (
    "micro=3 recompute zero=0",
    "zero=3 micro=2",
    "hidden dynamic micro=2 untied",
    # two GPUs
    "tp=2 untied vocab=200 heads=4 kv=2",
    "tp=2 seq=5 batch=3 micro=3 sp",
    "dp=2 zero=0 micro=2",
    "dp=2 zero=2 micro=2",
    "dp=2 zero=3 micro=2",
    "pp=2 micro=4",
    "pp=2 micro=4 gpipe relay recompute",
    "pp=2 layers=8 v=2 micro=4",
    "hidden pp=2 micro=3 pattern=first:2",
    # three: an odd ring
    "pp=3 layers=6 v=2 micro=6",
    # four
    "pp=4 layers=8 micro=4 pattern=stride:3 recompute",
    "pp=4 layers=8 v=2 micro=4",
    "pp=2 tp=2 sp micro=3",
    "pp=2 dp=2 micro=2 zero=0",
    # eight
    "pp=2 tp=2 dp=2 sp micro=3 recompute",
    "pp=4 tp=2 sp layers=8 v=2 micro=4",
    "pp=8 layers=8 micro=12",
)
BF16_LAYOUTS = ("pp=2 layers=6 micro=4", "tp=2 layers=6 sp micro=2", "pp=4 tp=2 layers=6 micro=4")


@pytest.mark.gpu
@pytest.mark.parametrize("text", LAYOUTS)
def test_layout_equals_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_config(text, "run.device=cuda"), run_fresh, TOLERANCE)


def test_fresh_ranks_equal_the_single_process_on_the_cpu() -> None:
    """The one above, but for the device."""
    assert_equals_the_single_process(make_config("pp=2 micro=4"), run_fresh)


@pytest.mark.parametrize(
    ("text", "device"),
    [*on_gpu("micro=2", *BF16_LAYOUTS), on_cpu(BF16_LAYOUTS[0])],
)
def test_bf16_is_near_the_fp32_single_process(text: str, device: str) -> None:
    expected = run_plain(make_config(text))
    actual, _ = run_layout(make_config(f"{text} bf16", f"run.device={device}"), run_fresh)
    assert actual.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=TENSOR_TOLERANCE)
    assert far_off(actual.gradients, expected.gradients) == {}
    assert far_off(actual.weights, expected.weights) == {}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "text", ["micro=2", "pp=2 micro=4", "tp=2 sp", "dp=2 micro=2 zero=3", "pp=2 v=2 micro=4", "tp=2 pp=2 dp=2 micro=2"]
)
def test_authors_numbers(text: str) -> None:
    report = run_parity(GOLDEN, [*overrides(text), "run.device=cuda"], TIMEOUT)
    assert report["passed"], report
