"""Saving and resuming a run. Collective: both functions, over all ranks."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lime_dist.backends.zero_state import KINDS, get_state, set_num_updates, set_state, set_weights
from lime_dist.checkpoint.checking import FORMAT, Meta
from lime_dist.checkpoint.reader import (
    find_before,
    find_checkpoints,
    find_latest,
    flush_to_disk,
    step_folder,
    write_json,
)
from lime_dist.checkpoint.saved_weights import SavedWeights
from lime_dist.config import to_dict
from lime_dist.errors import CheckpointError, TrainingDiverged
from lime_dist.lime.values import assemble_local, slices, specified_parameters
from lime_dist.plan.record import FILE_NAME, plan_record
from lime_dist.plan.tensors import ParameterSpec
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
    with _Agreed(rank, folder) as agreed:
        if rank.is_logger:
            _make_room(folder)
    with agreed:
        _write_slices(rank, folder)
    with agreed:
        if rank.is_logger:
            _finish(rank, folder, final, Meta(step, samples_seen, to_dict(rank.config), _stems(rank), spikes))
    return final


class _Agreed:
    """What one rank cannot do ends the save on all ranks. Collective: the end of each `with`, over all ranks."""

    def __init__(self, rank: Rank, folder: Path):
        self._rank, self._folder = rank, folder

    def __enter__(self) -> _Agreed:
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
        problems = list(filter(None, gather(problem, self._rank.device)))
        if problems:
            self._give_up(problems[0])

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


def _write_slices(rank: Rank, folder: Path) -> None:
    """Raises: TrainingDiverged for a tensor that is not finite."""
    tensors, places = {}, {}
    for spec, parameter in specified_parameters(rank.stage):
        rank.pulse.touch()
        for kind in KINDS:
            state = get_state(rank.optimizer, parameter, kind)  # all replicas take part
            for key, place, part in _owned_slices(rank, spec, kind, state):
                tensors[key], places[key] = part, place
    for key, part in tensors.items():
        if not bool(torch.isfinite(part).all()):
            raise TrainingDiverged(f"{key.partition('@')[0]} is not finite")
    if rank.groups.coordinate.dp_rank == 0:
        stem = _stem(rank)
        save_file(tensors, folder / f"{stem}.safetensors")
        flush_to_disk(folder / f"{stem}.safetensors")
        write_json(folder / f"{stem}.json", places)


def _owned_slices(rank: Rank, spec: ParameterSpec, kind: str, state: Tensor) -> Iterator[tuple[str, dict, Tensor]]:
    """What this rank writes: of what several ranks hold alike, the first writes it."""
    place = rank.groups.coordinate
    if place.dp_rank > 0 or spec.tied_copy or (place.tp_rank > 0 and not spec.sharded):
        return
    for piece, part in slices(spec, state):
        if piece.length:
            where = {"dim": piece.dim, "start": piece.start, "shape": list(piece.tensor.shape)}
            yield (
                f"{kind}:{piece.tensor.name}@{piece.start}",
                where,
                part.detach().to("cpu", torch.float32, copy=True).contiguous(),
            )


def _stem(rank: Rank, pp_rank: int | None = None, tp_rank: int | None = None) -> str:
    place = rank.groups.coordinate
    pp_rank = place.pp_rank if pp_rank is None else pp_rank
    tp_rank = place.tp_rank if tp_rank is None else tp_rank
    return f"pp{pp_rank:02d}-tp{tp_rank:02d}"


def _stems(rank: Rank) -> list[str]:
    """Of all files."""
    layout = rank.groups.layout
    return [_stem(rank, pp_rank, tp_rank) for pp_rank in range(layout.pp) for tp_rank in range(layout.tp)]


def _finish(rank: Rank, folder: Path, final: Path, meta: Meta) -> None:
    write_json(folder / FILE_NAME, plan_record(rank.run_plan))
    write_json(folder / "meta.json", {"format": FORMAT, **asdict(meta)})
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


def load_weights(rank: Rank, folder: Path) -> None:
    """Put the checkpoint's weights alone into the rank. Raises: CheckpointError."""
    saved = SavedWeights(folder, rank.config)
    set_weights(rank.optimizer, rank.stage, partial(saved.tensor, "weight"))


def load_checkpoint(rank: Rank, folder: Path) -> Meta:
    """Put the checkpoint's weights and moments into the rank. Raises: CheckpointError."""
    saved = SavedWeights(folder, rank.config)
    set_num_updates(rank.optimizer, saved.meta.num_updates)
    for spec, parameter in specified_parameters(rank.stage):
        rank.pulse.touch()
        for kind in KINDS:
            local = assemble_local(spec, partial(saved.tensor, kind))
            set_state(rank.optimizer, parameter, kind, local)
    return saved.meta
