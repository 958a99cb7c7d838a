"""The pipeline over channels that behave as NCCL does where gloo forgives; no GPU is needed.

The first operation between two ranks holds its caller until the other has come to its first, too. A send is done when its
receive is. The operations of a communicator run one after the other, in the order in which they were given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from functools import cache

import pytest
import torch
import torch.distributed as dist
from common import assert_equals_the_single_process, make_batches, make_config
from queues import check_operations
from test_layouts import LAYOUTS
from torch import Tensor
from torch.distributed import ProcessGroup

from lime_dist.lifecycle.local import RankFailed
from lime_dist.pipeline import transport
from lime_dist.plan.deadlock import PlanDefect
from lime_dist.plan.run_plan import plan_run
from lime_dist.testing import run_ranks
from lime_dist.training.rank import Rank

PATIENCE = 60.0  # seconds for what must come, on a busy machine
IMPATIENCE = 4.0  # for what will not
MESSAGE, READY = 0, 1  # gloo's tags


class Alone(RuntimeError):
    """An operation holds its caller, and the other rank does not come."""


@cache
def stream(communicator: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1)


class Work:
    """What `dist.Work` is to a link."""

    def __init__(self, operation: Future[None]):
        self._operation = operation

    def wait(self) -> None:
        try:
            self._operation.result(timeout=Channel.patience)
        except TimeoutError:
            raise Alone(f"rank {dist.get_rank()} waits for a message that is not under way") from None

    def is_completed(self) -> bool:
        return self._operation.done()


class Channel:
    """In place of `GroupChannel`, over the same gloo groups.

    is_of_a_pair: each two ranks of a group have a communicator (as torch makes them for single messages), else the group has one.
    """

    is_of_a_pair, patience = True, PATIENCE

    def __init__(self, group: ProcessGroup, peer: int):
        self.group, self.peer, self._is_connected = group, peer, False
        pair = sorted((dist.get_rank(), peer))
        self._name = f"{group.group_name}/{pair}"
        self._stream = stream(self._name if self.is_of_a_pair else group.group_name)

    def send(self, tensor: Tensor) -> Work:
        return self._start(self._send, tensor)

    def receive(self, tensor: Tensor) -> Work:
        return self._start(self._receive, tensor)

    def _start(self, operation: Callable[[Tensor], None], tensor: Tensor) -> Work:
        if not self._is_connected:
            self._connect()
        return Work(self._stream.submit(operation, tensor))

    def _connect(self) -> None:
        store = dist.distributed_c10d._get_default_store()
        store.add(self._name, 1)
        deadline = time.monotonic() + self.patience
        while store.add(self._name, 0) < 2:
            if time.monotonic() > deadline:
                raise Alone(f"rank {dist.get_rank()} is held and rank {self.peer} does not come")
            time.sleep(0.005)
        self._is_connected = True

    def _send(self, tensor: Tensor) -> None:
        dist.recv(torch.empty(1), self.peer, group=self.group, tag=READY)
        dist.send(tensor, self.peer, group=self.group, tag=MESSAGE)

    def _receive(self, tensor: Tensor) -> None:
        arriving = dist.irecv(tensor, self.peer, group=self.group, tag=MESSAGE)
        dist.send(torch.empty(1), self.peer, group=self.group, tag=READY)
        arriving.wait()


@pytest.fixture(autouse=True)
def channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "GroupChannel", Channel)  # ranks are forked, so they have it


# Fewer microbatches than stages is where a stage waits for a gradient before its neighbour has all that it needs for one.
FEW = ("pp=3 micro=1", "pp=3 micro=2", "pp=4 micro=2", "pp=2 micro=1")
# With virtual stages the last stage sends to the first: a ring, of an even and of an odd number of stages.
RINGS = (
    "pp=2 v=2 micro=1",
    "pp=2 v=2 micro=4 recompute",
    "pp=2 v=3 layers=6 micro=2 gpipe",
    "pp=3 v=2 layers=6 micro=2 hidden",
    "pp=3 v=2 layers=7 micro=6 warmup=11",
    "pp=3 v=3 layers=9 micro=4 gpipe recompute",
    "pp=4 v=2 layers=8 micro=4",
    "pp=2 v=2 tp=2 sp micro=3 recompute",
    "pp=3 v=2 dp=2 layers=6 micro=3 warmup=9",
)
WARMED_UP = ("pp=2 micro=4 warmup=3", "pp=3 micro=6 warmup=5 hidden", "pp=4 micro=6 warmup=6 recompute")
SHORT_LAYOUTS = (
    *FEW,
    *(f"{text} gpipe" for text in FEW),
    "pp=3 micro=4",
    "pp=3 tp=2 micro=2",
    "pp=2 dp=2 micro=3 gpipe",
    *WARMED_UP,
    *RINGS,
)


@pytest.mark.parametrize("text", SHORT_LAYOUTS)
def test_steps_equal_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_config(text))


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text in LAYOUTS if "pp=" in text])
def test_the_table_of_layouts_equals_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_config(text))


@pytest.mark.parametrize("text", ("pp=4 micro=2", "pp=3 micro=4", "pp=3 micro=2 gpipe", "pp=3 micro=6 warmup=5"))
def test_one_communicator_for_both_neighbours_does_as_well(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Channel, "is_of_a_pair", False)
    assert_equals_the_single_process(make_config(text))


def test_one_communicator_for_both_neighbours_hangs_where_the_model_of_queues_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A round of few microbatches: a stage has posted the receive of its next chunk's input before it sends what that comes from."""
    monkeypatch.setattr(Channel, "is_of_a_pair", False)
    monkeypatch.setattr(Channel, "patience", IMPATIENCE)
    config = make_config("pp=4 v=2 layers=8 micro=2")
    operations = [[*stage.operations(stage.actions)] for stage in plan_run(config).stages]
    with pytest.raises(PlanDefect, match="deadlock"):
        check_operations(operations, by_pair=False)
    with pytest.raises(RankFailed, match=r"Alone: rank \d waits for a message that is not under way"):
        run_ranks(config, Rank.accumulate, make_batches(config)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ("pp=3 micro=1", "pp=3 micro=2", "pp=4 micro=2", "pp=2 micro=4 gpipe", "pp=3 v=2 layers=6 micro=2 gpipe")
)
def test_without_open_boundaries_a_step_hangs(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Channel, "patience", IMPATIENCE)
    monkeypatch.setattr(transport.Transport, "open_boundaries", lambda *_: None)
    config = make_config(text)
    with pytest.raises(RankFailed, match=r"Alone: rank \d is held and rank \d does not come"):
        run_ranks(config, Rank.accumulate, make_batches(config)[0])
