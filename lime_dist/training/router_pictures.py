"""The router map of a run under any layout, from the slices that its ranks hold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
import torch.distributed as dist
from torch import Tensor

from lime_dist.analysis.routers import RouterMap, head_magnitudes, map_of_magnitudes
from lime_dist.backends.zero_state import get_state
from lime_dist.lime.values import slices, specified_parameters
from lime_dist.plan.tensors import Piece, Role
from lime_dist.training.rank import Rank


def gather_router_map(rank: Rank) -> RouterMap | None:
    """Of the optimiser's fp32 weights, the same as of the whole model's routers; None where there are none that are learned and the same for all tokens.

    A sum over ranks of what each owns, zero elsewhere: as small as the map however many ranks there are. Collective: world.
    """
    pattern, heads = rank.run_plan.transfer.pattern, rank.config.model.kv_heads
    if not pattern.num_edges or not pattern.routing.ranks_edges:
        return None
    rank.pulse.beat("routers")
    owned = numpy.zeros((heads, pattern.num_layers, pattern.num_layers))
    for piece, router in _own_routers(rank):
        reader = int(piece.tensor.name.split(".")[1])
        # Where a router is cut, it is along its sources.
        sources = (
            pattern.sources[reader][piece.start : piece.start + piece.length]
            if piece.dim == 1
            else pattern.sources[reader]
        )
        owned[:, reader, list(sources)] = head_magnitudes(pattern.routing, router.cpu().numpy())
    rank.pulse.finish()
    total = torch.from_numpy(owned).to(rank.device)
    dist.all_reduce(total)
    by_head = total.cpu().numpy()
    readers = filter(pattern.has_router, range(pattern.num_layers))
    return map_of_magnitudes(pattern, {reader: by_head[:, reader, list(pattern.sources[reader])] for reader in readers})


def _own_routers(rank: Rank) -> Iterator[tuple[Piece, Tensor]]:
    """Of what several ranks hold alike, the first gives it."""
    place = rank.groups.coordinate
    for spec, parameter in specified_parameters(rank.stage):
        if spec.role is not Role.ROUTER:
            continue
        weight = get_state(rank.optimizer, parameter, "weight")  # all replicas take part
        if place.dp_rank == 0 and (place.tp_rank == 0 or spec.sharded):
            yield from slices(spec, weight.detach())
