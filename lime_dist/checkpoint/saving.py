"""Saving a run's state, at once or behind training. Collective: over all ranks.

A save has two halves. Each rank's state comes to host memory, for which training waits; from there it is written,
which needs no device, and may happen on a thread. The ranks' threads talk over a group of their own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed import ProcessGroup

from lime_dist.checkpoint.checking import FORMAT, Meta, Origin
from lime_dist.checkpoint.staging import Staged, Staging, stage
from lime_dist.checkpoint.writing import Agreement, Unwritten, write_checkpoint
from lime_dist.config import recorded
from lime_dist.lifecycle.pulse import Pulse
from lime_dist.training.agreement import gather
from lime_dist.training.rank import Rank
from lime_dist.training.spikes import SpikeState


@dataclass(frozen=True)
class Progress:
    """step: done. samples_seen: the next sample to read."""

    step: int
    samples_seen: int
    spikes: SpikeState = SpikeState()


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A whole checkpoint. seconds: from the beginning of the save to its end; training waited for `wait_seconds` of them."""

    step: int
    folder: Path
    seconds: float
    wait_seconds: float


NOT_KNOWN = Origin()


def _nothing() -> None:
    """What a run does that nobody else can have, and that writes nothing beside its checkpoints."""


class Saver:
    """Saves of one run, one at a time. Collective: `save` and `settle`, world."""

    def __init__(
        self,
        checkpoints: Path,
        *,
        writers: ProcessGroup | None = None,
        check_owner: Callable[[], None] = _nothing,
        origin: Origin = NOT_KNOWN,
    ):
        """writers: a gloo group of all ranks, for the threads that write behind training; None: every save is at once.
        check_owner: asked on the first rank before a checkpoint gets its name; raises where another start has the run.
        """
        self._checkpoints, self._writers = checkpoints, writers
        self._check_owner, self._origin = check_owner, origin
        self._staging = Staging()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._saved: deque[Saved] = deque()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """What is being written is written to its end, whatever has ended the run."""
        self._threads.shutdown()

    def save(
        self, rank: Rank, progress: Progress, *, behind: bool = False, prepare: Callable[[], None] = _nothing
    ) -> None:
        """Write the weights and AdamW's moments, under a temporary name that is renamed when whole.

        Older ones go after that, but for those that `checkpoint.keep` and `keep_every` name. behind: return as soon as
        training may go on, where there are writers. prepare: what has to be on the disk before the checkpoint is.
        Raises: on all ranks, TrainingDiverged when something is not finite, FullDisk when the disk takes no more, of the save
        before too. The checkpoints that are there stay.
        """
        began = time.perf_counter()
        self.settle(rank.pulse)
        behind = behind and self._writers is not None
        agreement = Agreement(self._checkpoints, partial(gather, device=rank.device), rank.pulse)
        with agreement:
            prepare()
            staged = self._staging.copy(rank) if behind else stage(rank)
        part = self._part(rank, progress, staged)
        if behind:
            waited = time.perf_counter() - began
            self._writing = self._threads.submit(self._write, part, self._agreement_of_writers(), began, waited)
        else:
            self._write(part, agreement, began)

    def settle(self, pulse: Pulse) -> None:
        """Wait until nothing is being written. Raises: FullDisk, on all ranks."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        pulse.beat("save")
        writing.result()
        pulse.finish()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written, as far as this rank knows."""
        return self._writing is None or self._writing.done()

    @property
    def failure(self) -> BaseException | None:
        """What `settle` will raise, as far as this rank knows."""
        return None if self._writing is None or not self._writing.done() else self._writing.exception()

    def take_saved(self) -> Iterator[Saved]:
        """Checkpoints that have become whole since this was last asked."""
        while self._saved:
            yield self._saved.popleft()

    def _part(self, rank: Rank, progress: Progress, staged: list[Staged]) -> Unwritten:
        place = rank.groups.coordinate
        return Unwritten(
            checkpoints=self._checkpoints,
            stem=f"pp{place.pp_rank:02d}-tp{place.tp_rank:02d}-dp{place.dp_rank:03d}",
            staged=staged,
            meta=Meta(
                format=FORMAT,
                step=progress.step,
                samples_seen=progress.samples_seen,
                config=recorded(rank.config),
                files={},
                spikes=progress.spikes,
                origin=self._origin,
            ),
            run_plan=rank.run_plan,
            is_first=rank.is_logger,
            check_owner=self._check_owner,
        )

    def _agreement_of_writers(self) -> Agreement:
        """Away from the rank's pulse, which tells what training does."""
        talk = partial(gather, device=torch.device("cpu"), group=self._writers)
        return Agreement(self._checkpoints, talk, Pulse())

    def _write(self, part: Unwritten, agreement: Agreement, began: float, waited: float | None = None) -> None:
        folder, seconds = write_checkpoint(part, agreement), time.perf_counter() - began
        wait_seconds = seconds if waited is None else waited
        self._saved.append(Saved(step=part.meta.step, folder=folder, seconds=seconds, wait_seconds=wait_seconds))
