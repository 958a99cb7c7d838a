"""One rank's part in a profile: clocks, recorded steps, its file. Collective: world, but for `begin` and `end`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed import distributed_c10d

from lime_dist.errors import ConfigError, one_line
from lime_dist.lifecycle.launcher import host_name
from lime_dist.pipeline.recorder import Recorder
from lime_dist.pipeline.step_times import StepTimes
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.clocks import measure_offset
from lime_dist.profiling.kernel_trace import KernelTrace
from lime_dist.profiling.profile_files import (
    MeasuredLink,
    RankRecord,
    clear,
    kernels_file,
    profile_folder,
    write_head,
    write_rank,
)
from lime_dist.training.rank import Rank


class Profiler:
    """Records the steps first to last of a run, and writes them into its folder when the last one has ended."""

    def __init__(self, rank: Rank, *, first: int, last: int, links: tuple[MeasuredLink, ...] = ()):
        self._rank, self._first, self._last, self._links = rank, first, last, links
        self._folder = profile_folder(Path(rank.config.run.dir), first, last)
        self._steps: list[StepTimes] = []
        self._stack = ExitStack()
        self._before: ClockOffset | None = None
        self._kernels: KernelTrace | None = None

    def begin(self, step: int) -> None:
        """Step `step` (from 1) begins."""
        if step == self._first:
            self._start()
        if self._before is not None:
            assert self._rank.recorder is not None
            self._rank.recorder.begin()

    def end(self) -> Path | None:
        """The step has ended; the folder of the profile, when it is whole."""
        recorder = self._rank.recorder
        if recorder is None:
            return None
        recorder.mark()
        self._steps.append(recorder.take())
        return self._finish() if len(self._steps) == self._last - self._first + 1 else None

    def close(self) -> None:
        """A run that ends before the last step leaves no profile."""
        self._rank.recorder = None
        self._stack.close()

    def _start(self) -> None:
        if self._rank.config.profile.kernels:  # before ranks meet, as it takes long to start
            self._kernels = KernelTrace(self._rank.device)
            self._stack.callback(self._kernels.stop)
        self._before = measure_offset(self._rank.device)
        recorder = Recorder(self._rank.device)
        self._stack.enter_context(recorder.recording(self._rank.transport))
        self._rank.recorder = recorder

    def _finish(self) -> Path:
        self.close()
        assert self._before is not None
        offsets = self._before, measure_offset(self._rank.device)
        self._before = None
        with _naming(self._folder):
            self._write(offsets)
        return self._folder

    def _write(self, offsets: tuple[ClockOffset, ClockOffset]) -> None:
        if self._rank.is_logger:
            clear(self._folder)
        dist.barrier()
        write_rank(self._folder, _record(self._rank.device, offsets, tuple(self._steps)))
        self._write_kernels()
        dist.barrier()
        if self._rank.is_logger:  # last: a folder that has it is whole
            write_head(self._folder, self._rank.run_plan, range(self._first, self._last + 1), self._links)

    def _write_kernels(self) -> None:
        global_rank = dist.get_rank()
        if self._kernels is None:
            kernels_file(self._folder, global_rank).unlink(missing_ok=True)  # of an earlier recording of these steps
        else:
            self._kernels.write(self._folder, global_rank)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Raises: ConfigError where the disk or its rights do not let ranks write."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ConfigError(f"run.dir: {folder}: {reason}; name a folder that all ranks can write to") from None


def _record(device: torch.device, offsets: tuple[ClockOffset, ClockOffset], steps: tuple[StepTimes, ...]) -> RankRecord:
    is_cpu = device.type == "cpu"
    return RankRecord(
        rank=dist.get_rank(),
        host=host_name(),
        device="CPU" if is_cpu else torch.cuda.get_device_name(device),
        cores=len(os.sched_getaffinity(0)) if is_cpu else None,
        threads=torch.get_num_threads(),
        offsets=offsets,
        epoch_ns=time.time_ns() - time.monotonic_ns(),
        group_ranks=_group_ranks(steps),
        steps=steps,
    )


def _group_ranks(steps: tuple[StepTimes, ...]) -> dict[str, tuple[int, ...]]:
    """Of the groups that have been used."""
    used = {each.group_name for step in steps for each in step.collectives}
    return {
        str(group.group_name): tuple(sorted(dist.get_process_group_ranks(group)))
        for group in distributed_c10d._world.pg_map
        if group.group_name in used
    }
