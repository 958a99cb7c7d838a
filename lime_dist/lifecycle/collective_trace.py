"""torch's flight recorder: the last operations of each process group, and how far each group has come.

On GPUs the host only launches operations, so that what its own beats count may be launched and not done. The recorder asks
the device. torch itself writes it to a file (for `torchfrtrace`) when an operation of NCCL fails or runs into its timeout.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import MutableMapping
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

_OLDER_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}


def trace_folder(run_dir: Path) -> Path:
    return run_dir / "collectives"


def record_collectives(folder: Path, environment: MutableMapping[str, str] = os.environ) -> None:
    """Before process groups are made; what the user has set stays."""
    wanted = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder.absolute() / "nccl_rank_"),
    }
    for name, value in wanted.items():
        if _OLDER_NAMES.get(name, name) not in environment:
            environment.setdefault(name, value)


def runs_on_nccl() -> bool:
    return dist.is_initialized() and dist.get_backend() == "nccl"


def write_collectives(folder: Path, global_rank: int, patience: float) -> Path | None:
    """What the recorder of this rank holds, as JSON; None where it holds nothing, or no disk takes it.

    A device that does not answer would hold the whole process, so after `patience` seconds of it that is ended.
    """
    # NCCL's operations are kept apart from those of other backends; torch 2.11 on has both names, as its build has NCCL.
    dump = getattr(_distributed_c10d, "_dump_nccl_trace_json" if runs_on_nccl() else "_dump_fr_trace_json", None)
    if dump is None or not dist.is_initialized():
        return None
    path = folder / f"rank_{global_rank:05d}.json"
    faulthandler.dump_traceback_later(patience, exit=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(dump())
        return path
    except (OSError, RuntimeError):
        return None
    finally:
        faulthandler.cancel_dump_traceback_later()
