"""What a device can do at most, by the name that torch gives it: dense matrix products, as makers' data sheets have them.

Data sheets of NVIDIA's tensor cores count with structured sparsity where they do not say otherwise: half of that is dense.
fp32 is without tensor cores, as TF32 is not used here. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PeakTflops:
    """TFLOP/s by what `run.dtype` may be; None where the device has no units for it.

    words: of the device's name, all of which it has.
    """

    words: frozenset[str]
    bf16: float | None
    fp32: float

    def of(self, dtype: str) -> float | None:
        return {"bf16": self.bf16, "fp32": self.fp32}[dtype]


def _peak(words: str, *, bf16: float | None, fp32: float) -> PeakTflops:
    return PeakTflops(words=frozenset(words.split()), bf16=bf16, fp32=fp32)


# The first that fits counts.
KNOWN_DEVICES = (
    _peak("V100 SXM2", bf16=None, fp32=15.7),  # NVIDIA V100 data sheet (January 2020)
    _peak("V100 PCIE", bf16=None, fp32=14.0),  # the same
    _peak("A100", bf16=312, fp32=19.5),  # NVIDIA A100 data sheet: PCIe and SXM, 40 and 80 GB
    _peak("L40S", bf16=362.05, fp32=91.6),  # NVIDIA L40S data sheet
    _peak("H100 NVL", bf16=835.5, fp32=60),  # NVIDIA H100 data sheet: 1,671 with sparsity
    _peak("H100 PCIe", bf16=756, fp32=51),  # NVIDIA H100 data sheet of 2022: 1,513 with sparsity
    _peak("H100 HBM3", bf16=989, fp32=67),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    _peak("H200 NVL", bf16=835.5, fp32=60),  # NVIDIA H200 data sheet: 1,671 with sparsity
    _peak("H200", bf16=989, fp32=67),  # NVIDIA H200 data sheet, SXM: 1,979 with sparsity
    _peak("B200", bf16=2250, fp32=80),  # NVIDIA Blackwell architecture technical brief, HGX B200: 4,500 with sparsity
    _peak("GB200", bf16=2500, fp32=90),  # the same, GB200: 5,000 with sparsity
    _peak("MI300X", bf16=1307.4, fp32=163.4),  # AMD Instinct MI300X data sheet
)


def find_peak_tflops(device_name: str, dtype: str) -> float | None:
    """None for a device that is not known, has no units for `dtype` or is a slice of one (MIG)."""
    words = set(device_name.replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((device.of(dtype) for device in KNOWN_DEVICES if device.words <= words), None)
