"""Putting a checkpoint into ranks. Collective: over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lime_dist.backends.zero_state import own_shares, set_num_updates, share_weights, write_share
from lime_dist.checkpoint.boxes import parts_of
from lime_dist.checkpoint.checking import Meta
from lime_dist.checkpoint.saved_weights import SavedWeights
from lime_dist.checkpoint.staging import box_of_share
from lime_dist.errors import CheckpointError
from lime_dist.plan.tensors import KINDS
from lime_dist.training.agreement import gather
from lime_dist.training.rank import Rank


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
        read_shares(rank, saved, kinds)
    except CheckpointError as error:
        problem = str(error)
    if problems := list(filter(None, gather(problem, rank.device))):
        raise CheckpointError(problems[0])
    share_weights(rank.optimizer, rank.stage)
    return saved.meta


def read_shares(rank: Rank, saved: SavedWeights, kinds: Sequence[str]) -> None:
    """Put this replica's share into its optimiser; what the model computes with follows in `share_weights`."""
    for share in own_shares(rank.optimizer, rank.stage):
        for kind in kinds if share.start < share.stop else ():
            rank.pulse.touch()
            values = torch.zeros(share.stop - share.start)  # padding stays so
            parts = list(parts_of(share.spec, share.start, share.stop))
            saved.read(kind, [(part, box_of_share(values, share, part.local)) for part in parts])
            write_share(rank.optimizer, share, kind, values)
