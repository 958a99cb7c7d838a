"""The wish to stop of any rank, agreed on by all, so that all leave at the same point."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from lime_dist.lifecycle.pulse import Pulse
from lime_dist.lifecycle.stopping import STOPPING, StopRequest


class Stopped(Exception):
    """All ranks have agreed to leave here, with nothing to save."""


class JointStop:
    """Every rank has one; made when the ranks have met. Collective: `agreed` and `check`, world."""

    def __init__(self, request: StopRequest, device: torch.device):
        self._request, self._device = request, device
        self._is_first = request.says_so = dist.get_rank() == 0
        self._is_told = False
        request.is_alone = False

    @property
    def cause(self) -> str:
        return self._request.signal_name or "stop asked of another rank"

    def asked_here(self) -> bool:
        """Whether this rank was; a step tells it to the others with what else it tells."""
        return self._request.signal_name is not None

    def agreed(self) -> bool:
        """Whether any rank was asked to stop."""
        asked = torch.tensor(int(self.asked_here()), device=self._device)
        dist.all_reduce(asked)
        return self.heard(bool(asked.item()))

    def heard(self, asked: bool) -> bool:
        """`asked`: whether any rank was. Of one that the first rank was not asked itself, it says so here."""
        if asked and self._is_first and not self._is_told and not self.asked_here():
            print(f"{self.cause}: {STOPPING}", file=sys.stderr, flush=True)
            self._is_told = True
        return asked

    def check(self) -> None:
        """Raises: Stopped on all ranks when any was asked to stop."""
        if self.agreed():
            raise Stopped(self.cause)


def between_parts(stop: JointStop, pulse: Pulse) -> Callable[[], None]:
    """What long work calls between its parts. Collective: world, what it returns; it raises Stopped."""

    def moment() -> None:
        pulse.touch()
        stop.check()

    return moment
