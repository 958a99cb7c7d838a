"""The peaks of devices by the names that torch gives them."""

from __future__ import annotations

import pytest

from lime_dist.training.peak_flops import find_peak_tflops

NAMES = (  # the name, TFLOP/s in bf16 and in fp32
    ("Tesla V100-SXM2-32GB", None, 15.7),
    ("NVIDIA A100-SXM4-80GB", 312, 19.5),
    ("NVIDIA A100 80GB PCIe", 312, 19.5),
    ("NVIDIA L40S", 362.05, 91.6),
    ("NVIDIA H100 80GB HBM3", 989, 67),
    ("NVIDIA H100 PCIe", 756, 51),
    ("NVIDIA H100 NVL", 835.5, 60),
    ("NVIDIA H200", 989, 67),
    ("NVIDIA H200 NVL", 835.5, 60),
    ("NVIDIA B200", 2250, 80),
    ("NVIDIA GB200", 2500, 90),
    ("AMD Instinct MI300X", 1307.4, 163.4),
    ("NVIDIA H20", None, None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ("NVIDIA GeForce RTX 4090", None, None),
)


@pytest.mark.parametrize(("name", "bf16", "fp32"), NAMES)
def test_known_names(name: str, bf16: float | None, fp32: float | None) -> None:
    assert (find_peak_tflops(name, "bf16"), find_peak_tflops(name, "fp32")) == (bf16, fp32)
