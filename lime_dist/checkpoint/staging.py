"""What a rank writes into a checkpoint: its own shares, in host memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy
import torch
from torch import Tensor

from lime_dist.backends.zero_state import Share, own_shares, read_share
from lime_dist.checkpoint.boxes import Box, cut_into_chunks, parts_of
from lime_dist.checkpoint.chunk_files import chunk_key
from lime_dist.errors import TrainingDiverged
from lime_dist.plan.tensors import KINDS, ParameterSpec
from lime_dist.training.rank import Rank


@dataclass(frozen=True)
class Staged:
    """`kind` of a share. values: fp32 [stop - start], on the CPU."""

    kind: str
    share: Share
    values: Tensor


class Staging:
    """Host memory for what is saved, of one save at a time; made at the first, used again by the next."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def copy(self, rank: Rank) -> list[Staged]:
        """Does not change when training goes on. Raises: TrainingDiverged for a tensor that is not finite."""
        staged = []
        for kind, share, values in _own_state(rank):
            rank.pulse.touch()
            staged.append(Staged(kind, share, self._copy(kind, share, values)))
        current = {(one.kind, one.share.spec.name) for one in staged}
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if key in current}
        if rank.device.type == "cuda":
            torch.cuda.synchronize(rank.device)  # the copies are queued
        return staged

    def _copy(self, kind: str, share: Share, values: Tensor) -> Tensor:
        """Pinned where it comes from a GPU, so that the copy runs at the bus's speed."""
        key = kind, share.spec.name
        if key not in self._buffers or self._buffers[key].shape != values.shape:
            self._buffers[key] = torch.empty(values.shape, pin_memory=values.is_cuda)
        return self._buffers[key].copy_(values, non_blocking=True)


def stage(rank: Rank) -> list[Staged]:
    """Without a copy where it lies in host memory as fp32. Raises: TrainingDiverged for a tensor that is not finite."""
    return [Staged(kind, share, values.to("cpu", torch.float32)) for kind, share, values in _own_state(rank)]


_State = list[tuple[str, Share, Tensor]]  # kind, share, values where they lie


def _own_state(rank: Rank) -> _State:
    """Raises: TrainingDiverged."""
    shares = [share for share in own_shares(rank.optimizer, rank.stage) if share.start < share.stop]
    ours = [share for share in shares if _is_ours(rank, share.spec)]
    state = [(kind, share, read_share(rank.optimizer, share, kind)) for share in ours for kind in KINDS]
    _require_finite(state)
    return state


def _is_ours(rank: Rank, spec: ParameterSpec) -> bool:
    """Of what several ranks hold alike, the first writes it."""
    return not spec.tied_copy and (spec.sharded or rank.groups.coordinate.tp_rank == 0)


def _require_finite(state: _State) -> None:
    """By the extremes of each tensor, which one reading gives, and which a NaN is among; the host waits for each device once.

    Raises: TrainingDiverged.
    """
    names: dict[torch.device, list[str]] = {}  # DeepSpeed may keep some on another one
    extremes: dict[torch.device, list[Tensor]] = {}
    for kind, share, values in state:
        for part in parts_of(share.spec, share.start, share.stop):
            names.setdefault(values.device, []).append(f"{kind}:{part.tensor.name}")
            extremes.setdefault(values.device, []).extend(torch.aminmax(box_of_share(values, share, part.local)))
    for device, found in extremes.items():
        are_finite = torch.stack(found).isfinite().view(-1, 2).all(dim=1).tolist()
        for name, is_finite in zip(names[device], are_finite, strict=True):
            if not is_finite:
                raise TrainingDiverged(f"{name} is not finite")


def chunks_of(staged: Iterable[Staged]) -> Iterator[tuple[str, numpy.ndarray]]:
    """By key: contiguous, fp32. Needs no rank."""
    for one in staged:
        for part in parts_of(one.share.spec, one.share.start, one.share.stop):
            for chunk in cut_into_chunks(part):
                values = box_of_share(one.values, one.share, chunk.local).contiguous()
                yield chunk_key(one.kind, part.tensor.name, chunk.logical), values.numpy()


def box_of_share(values: Tensor, share: Share, box: Box) -> Tensor:
    """The elements of `box` of the parameter, where they lie in `values`, its elements from `share.start` on."""
    strides = [prod(share.spec.shape[dim + 1 :]) for dim in range(len(box.sizes))]
    start = sum(offset * stride for offset, stride in zip(box.offsets, strides, strict=True)) - share.start
    return values.as_strided(box.sizes, strides, values.storage_offset() + start)
