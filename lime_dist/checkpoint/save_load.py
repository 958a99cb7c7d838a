"""Saving and resuming a run. Collective: both functions, over all ranks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from lime_dist.backends.zero_state import KINDS, get_state, set_num_updates, set_state
from lime_dist.checkpoint.files import FORMAT, Meta, find_checkpoints, flush_to_disk, step_folder, write_json
from lime_dist.checkpoint.weights import SavedWeights
from lime_dist.config import to_dict
from lime_dist.lime.parameters import ParameterSpec
from lime_dist.lime.weights import assemble_local, slices, specified_parameters
from lime_dist.rank import Rank


def save_checkpoint(rank: Rank, checkpoints: Path, *, step: int, samples_seen: int) -> Path:
    """Write the weights and AdamW's moments after `step` updates, under a temporary name that is renamed when whole.

    Older checkpoints beyond `checkpoint.keep` are removed after that.
    """
    final = step_folder(checkpoints, step)
    folder = final.with_name(f".unfinished-{final.name}")
    if rank.is_logger:
        for left_behind in checkpoints.glob(".unfinished-*"):
            shutil.rmtree(left_behind)
        folder.mkdir(parents=True)
    dist.barrier()
    _write_slices(rank, folder)
    dist.barrier()
    if rank.is_logger:
        _finish(rank, folder, final, step, samples_seen)
    dist.barrier()
    return final


def _write_slices(rank: Rank, folder: Path) -> None:
    tensors, places = {}, {}
    for spec, parameter in specified_parameters(rank.stage):
        rank.pulse.touch()
        for kind in KINDS:
            state = get_state(rank.optimizer, parameter, kind)  # all replicas take part
            for key, place, part in _owned_slices(rank, spec, kind, state):
                tensors[key], places[key] = part, place
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


def _finish(rank: Rank, folder: Path, final: Path, step: int, samples_seen: int) -> None:
    layout = rank.groups.layout
    files = [_stem(rank, pp_rank, tp_rank) for pp_rank in range(layout.pp) for tp_rank in range(layout.tp)]
    meta = {
        "format": FORMAT,
        "step": step,
        "samples_seen": samples_seen,
        "config": to_dict(rank.config),
        "files": files,
    }
    write_json(folder / "meta.json", meta)
    if final.exists():
        _remove(final)
    os.rename(folder, final)
    for old in find_checkpoints(final.parent)[: -rank.config.checkpoint.keep]:
        _remove(old)


def _remove(folder: Path) -> None:
    """Under a name that is no checkpoint's first, so that none is ever half there."""
    leaving = folder.with_name(f".unfinished-old-{folder.name}")
    os.rename(folder, leaving)
    shutil.rmtree(leaving)


def load_checkpoint(rank: Rank, folder: Path) -> Meta:
    """Put the checkpoint's weights and moments into the rank. Raises: CheckpointError."""
    saved = SavedWeights(folder, rank.config)
    set_num_updates(rank.optimizer, saved.meta.step)
    for spec, parameter in specified_parameters(rank.stage):
        rank.pulse.touch()
        for kind in KINDS:
            local = assemble_local(spec, lambda tensor, kind=kind: saved.tensor(kind, tensor))
            set_state(rank.optimizer, parameter, kind, local)
    return saved.meta
