"""Saving and resuming a run. Collective: the functions that take a rank, over all ranks."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy
import torch
from safetensors import SafetensorError
from torch import Tensor

from lime_dist.backends.zero_state import (
    Share,
    own_shares,
    read_share,
    set_num_updates,
    share_weights,
    write_share,
)
from lime_dist.checkpoint.boxes import Box, cut_into_chunks, parts_of
from lime_dist.checkpoint.checking import FORMAT, Meta, meta_text
from lime_dist.checkpoint.chunk_files import chunk_key, write_chunks
from lime_dist.checkpoint.reader import find_before, find_checkpoints, find_latest, step_folder
from lime_dist.checkpoint.safe_files import flush_to_disk, write_bytes
from lime_dist.checkpoint.saved_weights import SavedWeights
from lime_dist.config import to_dict
from lime_dist.errors import CheckpointError, TrainingDiverged
from lime_dist.plan.record import FILE_NAME, plan_record
from lime_dist.plan.tensors import KINDS, ParameterSpec
from lime_dist.training.agreement import gather
from lime_dist.training.rank import Rank
from lime_dist.training.spikes import SpikeState

NO_SPIKES = SpikeState()


def save_checkpoint(
    rank: Rank, checkpoints: Path, *, step: int, samples_seen: int, spikes: SpikeState = NO_SPIKES
) -> Path:
    """Write the weights and AdamW's moments after `step` steps, under a temporary name that is renamed when whole.

    Older checkpoints beyond `checkpoint.keep` are removed after that, but for the one to which a next bad step would lead back.
    Raises: TrainingDiverged when something is not finite, CheckpointError when the disk takes no more; on all ranks, and
    the checkpoints that are there stay.
    """
    final = step_folder(checkpoints, step)
    folder = final.with_name(f"{_UNFINISHED}{final.name}")
    agreed = _Agreed(rank, folder)
    with agreed:
        if rank.is_logger:
            _make_room(folder)
    with agreed:
        agreed.found = _write(rank, folder)
    files = dict(filter(None, agreed.told))
    with agreed:
        if rank.is_logger:
            _finish(rank, folder, final, Meta(FORMAT, step, samples_seen, to_dict(rank.config), files, spikes))
    return final


class _Agreed:
    """What one rank cannot do ends the save on all ranks. Collective: the end of each `with`, over all ranks."""

    def __init__(self, rank: Rank, folder: Path):
        self._rank, self._folder = rank, folder
        self.found: Any = None  # to tell the others
        self.told: list[Any] = []  # what each rank found

    def __enter__(self) -> _Agreed:
        self.found = None
        self._rank.pulse.beat("save")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._rank.pulse.finish()
        problem = None
        if isinstance(error, TrainingDiverged):
            problem = {"diverged": str(error)}
        elif error is not None and (reason := disk_problem(error)) is not None:
            problem = {"disk": reason}
        elif error is not None:
            return
        told = gather([problem, self.found], self._rank.device)
        problems = [problem for problem, _ in told if problem is not None]
        if problems:
            self._give_up(problems[0])
        self.told = [found for _, found in told]

    def _give_up(self, problem: dict[str, str]) -> NoReturn:
        if self._rank.is_logger:
            shutil.rmtree(self._folder, ignore_errors=True)
        if "diverged" in problem:
            raise TrainingDiverged(problem["diverged"]) from None
        checkpoints = self._folder.parent
        raise _full_disk(f"checkpoint {checkpoints}", problem["disk"], checkpoints) from None


@contextmanager
def naming_full_disk(run_dir: Path, checkpoints: Path) -> Iterator[None]:
    """For what a run writes besides checkpoints. Raises: CheckpointError when the disk takes no more."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise _full_disk(f"run.dir: {run_dir}", os.strerror(error.errno), checkpoints) from None


def _full_disk(what: str, reason: str, checkpoints: Path) -> CheckpointError:
    last = find_latest(checkpoints)
    return CheckpointError(
        f"{what}: {reason}; free space or name another run.dir, then start again"
        f" (the last whole checkpoint is {last.name if last else 'none'})"
    )


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.ENOTDIR)


def disk_problem(error: BaseException) -> str | None:
    """In words, when the disk takes nothing more until someone sees to it; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return os.strerror(number) if number in (*FULL_DISK, *_NOT_WRITABLE) else None


_UNFINISHED = ".unfinished-"


def _make_room(folder: Path) -> None:
    """Remove what an interrupted save left, and nothing else; then make the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left_behind in folder.parent.glob(f"{_UNFINISHED}*step_*"):
        _delete(left_behind)
    folder.mkdir()


def _write(rank: Rank, folder: Path) -> tuple[str, str] | None:
    """What this rank has: the file's stem and its index's checksum; None where it has nothing.

    Raises: TrainingDiverged for a tensor that is not finite.
    """
    chunks: dict[str, numpy.ndarray] = {}
    for share in own_shares(rank.optimizer, rank.stage):
        if share.start < share.stop and _is_ours(rank, share.spec):
            for kind in KINDS:
                rank.pulse.touch()
                values = read_share(rank.optimizer, share, kind).to("cpu", torch.float32)
                chunks |= _chunks(kind, share, values)
    stem = _stem(rank)
    return (stem, write_chunks(folder, stem, chunks)) if chunks else None


def _is_ours(rank: Rank, spec: ParameterSpec) -> bool:
    """Of what several ranks hold alike, the first writes it."""
    return not spec.tied_copy and (spec.sharded or rank.groups.coordinate.tp_rank == 0)


def _chunks(kind: str, share: Share, values: Tensor) -> Iterator[tuple[str, numpy.ndarray]]:
    for part in parts_of(share.spec, share.start, share.stop):
        if not bool(torch.isfinite(_box(values, share, part.local)).all()):
            raise TrainingDiverged(f"{kind}:{part.tensor.name} is not finite")
        for chunk in cut_into_chunks(part):
            found = _box(values, share, chunk.local).contiguous()
            yield chunk_key(kind, part.tensor.name, chunk.logical), found.numpy()


def _box(values: Tensor, share: Share, box: Box) -> Tensor:
    """The elements of `box` of the parameter, where they lie in `values`, its elements from `share.start` on."""
    strides = [prod(share.spec.shape[dim + 1 :]) for dim in range(len(box.sizes))]
    start = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True)) - share.start
    return values.as_strided(box.sizes, strides, values.storage_offset() + start)


def _stem(rank: Rank) -> str:
    place = rank.groups.coordinate
    return f"pp{place.pp_rank:02d}-tp{place.tp_rank:02d}-dp{place.dp_rank:03d}"


def _finish(rank: Rank, folder: Path, final: Path, meta: Meta) -> None:
    write_bytes(folder / FILE_NAME, json.dumps(plan_record(rank.run_plan)).encode())
    write_bytes(folder / "meta.json", meta_text(asdict(meta)))
    flush_to_disk(folder)
    if os.path.lexists(final):
        _remove(final)
    os.rename(folder, final)
    flush_to_disk(final.parent)
    needed = find_before(final.parent, meta.spikes.bad_steps[0]) if meta.spikes.bad_steps else None
    for old in find_checkpoints(final.parent)[: -rank.config.checkpoint.keep]:
        if old != needed:
            _remove(old)


def _remove(folder: Path) -> None:
    """Under a name that is no checkpoint's first, so that none is ever half there."""
    leaving = folder.with_name(f"{_UNFINISHED}old-{folder.name}")
    os.rename(folder, leaving)
    _delete(leaving)


def _delete(path: Path) -> None:
    """A link goes, and what it leads to stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


# ---- loading


def load_weights(rank: Rank, folder: Path) -> None:
    """Put the checkpoint's weights alone into the rank. Raises: CheckpointError, on all ranks."""
    _load(rank, folder, ("weight",))


def load_checkpoint(rank: Rank, folder: Path) -> Meta:
    """Put the checkpoint's weights and moments into the rank. Raises: CheckpointError, on all ranks."""
    meta = _load(rank, folder, KINDS)
    set_num_updates(rank.optimizer, meta.num_updates)
    return meta


def _load(rank: Rank, folder: Path, kinds: Sequence[str]) -> Meta:
    """Each replica reads its own share, and gets from the others what it has of theirs."""
    problem = None
    try:
        saved = SavedWeights(folder, rank.config)
        _read(rank, saved, kinds)
    except CheckpointError as error:
        problem = str(error)
    if problems := list(filter(None, gather(problem, rank.device))):
        raise CheckpointError(problems[0])
    share_weights(rank.optimizer, rank.stage)
    return saved.meta


def _read(rank: Rank, saved: SavedWeights, kinds: Sequence[str]) -> None:
    for share in own_shares(rank.optimizer, rank.stage):
        for kind in kinds if share.start < share.stop else ():
            rank.pulse.touch()
            values = torch.zeros(share.stop - share.start)  # padding stays so
            parts = list(parts_of(share.spec, share.start, share.stop))
            saved.read(kind, [(part, _box(values, share, part.local)) for part in parts])
            write_share(rank.optimizer, share, kind, values)
