"""For tests and `lime-dist parity`: work on the ranks of a config, and every tensor from the pieces that they hold."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lime_dist.config import Config
from lime_dist.lifecycle.launcher import own_place
from lime_dist.lifecycle.local import run_local
from lime_dist.lime.values import slices, specified_parameters
from lime_dist.plan.run_plan import plan_run
from lime_dist.training.rank import Rank
from lime_dist.training.world import join_world


def run_ranks(config: Config, work: Callable[..., Any], *args: Any, timeout: timedelta | None = None) -> list[Any]:
    """`work(rank, *args)` on every rank of the layout of a checked config, each a fork; results by rank.

    For the CPU only, where `work` may be any function. The parent must not have run a threaded CPU operation (see `local`).
    """
    layout = config.layout
    return run_local(
        on_rank,
        layout.world_size,
        config,
        work,
        *args,
        timeout=timeout,
        describe=lambda rank: str(layout.coordinate(rank)),
    )


def on_rank(config: Config, work: Callable[..., Any], *args: Any) -> Any:
    """`work(rank, *args)` on this rank, begun by `local`. Collective: world."""
    groups, device = join_world(config, own_place())
    result = work(Rank(plan_run(config), groups, device), *args)
    dist.barrier()  # no rank leaves while another still talks to it
    return result


Pieces = list[tuple[str, tuple[int, ...], int, int, Tensor]]  # name, whole shape, dim, start, values


def local_pieces(rank: Rank, local_of: Callable[[nn.Parameter], Tensor]) -> Pieces:
    """This rank's slices of every logical tensor; `local_of` gives the parameter's values or gradient."""
    return [
        (piece.tensor.name, piece.tensor.shape, piece.dim, piece.start, part.detach().float().cpu().clone())
        for spec, parameter in specified_parameters(rank.stage)
        for piece, part in slices(spec, local_of(parameter))
    ]


def assemble(pieces_of_ranks: list[Pieces]) -> dict[str, Tensor]:
    """Whole logical tensors from the slices of all ranks.

    Slices that several ranks hold (replicas, tied copies, replicated parameters) must agree to the last bit;
    every element must be covered. Raises: ValueError otherwise.
    """
    wholes: dict[str, Tensor] = {}
    for name, shape, dim, start, values in (piece for pieces in pieces_of_ranks for piece in pieces):
        whole = wholes.setdefault(name, torch.full(shape, float("nan")))
        target = whole.narrow(dim, start, values.shape[dim])
        known = ~target.isnan()
        if not torch.equal(target[known], values[known]):
            raise ValueError(f"{name}: ranks that should hold the same values differ")
        target.copy_(values)
    for name, whole in wholes.items():
        if whole.isnan().any():
            raise ValueError(f"{name}: not all of it is held by some rank, or it has NaNs")
    return wholes
