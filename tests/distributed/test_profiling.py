"""Recording on real ranks: it changes no number, loses nothing of a step, and leaves no trace when it ends; faults are named."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import LR_FACTORS, make_batches, make_config, weight_of
from torch import Tensor
from torch.distributed import ProcessGroup

from lime_dist.lifecycle.local import RankFailed, run_local
from lime_dist.pipeline.transport import GroupChannel
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.analysis import Analysis
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.clocks import MonotonicClock, measure_offset
from lime_dist.profiling.profile_files import Profile, ProfileError, read_profile
from lime_dist.profiling.profiler import Profiler
from lime_dist.profiling.timeline import Cause
from lime_dist.testing import Pieces, local_pieces, run_ranks
from lime_dist.training.rank import Rank

FIRST, LAST = 2, 3  # of the three steps of `make_batches`

# ---- clocks

SECOND = 10**9
AHEAD = (0, 3_600 * SECOND, -5 * SECOND, 123_456_789)  # ns, by rank
DRIFT = (2e-5, -5e-5, 1e-4, 0.0)
# A clock drifts while its offset is measured, in which time ranks meet some dozens of times.
DRIFT_MEANWHILE = 100_000
LARGEST_ERROR = 5_000_000  # on a machine with fewer cores than ranks


def _offset_and_truth(identities: tuple[str, ...], zero: int) -> tuple[ClockOffset, float]:
    """Measured with clocks that have been made wrong, and what it is."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def shown(true: float, of: int) -> float:
        return true + AHEAD[of] + DRIFT[of] * (true - zero)

    clock = MonotonicClock(lambda: round(shown(time.monotonic_ns(), rank)), identities[rank])
    offset = measure_offset(torch.device("cpu"), clock)
    true = (offset.at - AHEAD[rank] + DRIFT[rank] * zero) / (1 + DRIFT[rank])
    dist.barrier()
    dist.destroy_process_group()
    return offset, offset.at - shown(true, 0)


def test_offsets_of_clocks_lie_within_the_error_that_is_stated() -> None:
    first, *others = run_local(_offset_and_truth, 4, ("a", "b", "c", "d"), time.monotonic_ns() - 20 * SECOND)
    assert (first[0].ahead, first[0].error) == (0, 0)
    for offset, truth in others:
        assert abs(truth) > SECOND / 10
        assert abs(offset.ahead - truth) <= offset.error + DRIFT_MEANWHILE
        assert 0 < offset.error < LARGEST_ERROR


def test_ranks_of_one_kernel_have_one_clock() -> None:
    offsets = [offset for offset, _ in run_local(_offset_and_truth, 4, ("a", "a", "b", "a"), time.monotonic_ns())]
    assert [(offset.ahead, offset.error) for offset in (offsets[0], offsets[1], offsets[3])] == [(0, 0)] * 3
    assert offsets[2].error > 0
    assert MonotonicClock.own().identity == MonotonicClock.own().identity != ""


# ---- recording


@dataclass
class Seen:
    """By one rank, of three steps. states: how things stand in each of them, and then."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    weights: Pieces = field(default_factory=list)
    states: list[dict[str, int]] = field(default_factory=list)


def _train(rank: Rank, batches: list[Tensor], recorded: bool) -> Seen:
    seen, state = Seen(), _State(rank)
    profiler = Profiler(rank, first=FIRST, last=LAST) if recorded else None
    for step, batch in enumerate(batches, start=1):
        if profiler is not None:
            profiler.begin(step)
        result = rank.train_step(batch, LR_FACTORS[step - 1])
        seen.states.append(state.now())
        if profiler is not None:
            profiler.end()
        seen.losses.append(result.loss)
        seen.grad_norms.append(result.grad_norm)
    seen.weights = local_pieces(rank, weight_of(rank))
    while "arrivals" in _thread_names():  # those that have been told to end
        time.sleep(0.001)
    seen.states.append(state.now())
    return seen


def _thread_names() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name == "arrivals")


class _State:
    """What recording touches."""

    def __init__(self, rank: Rank):
        self._rank = rank
        self._collectives = dict(vars(ProcessGroup))
        self._follows: list[object] = []
        run = rank._executor.run

        def run_and_note(*args: object, **how: object) -> list[Tensor]:
            self._follows.append(how.get("follow", iter))
            return run(*args, **how)  # type: ignore[arg-type]

        object.__setattr__(rank._executor, "run", run_and_note)

    def now(self) -> dict[str, int]:
        transport = self._rank.transport
        incoming = [link for link in (transport.from_previous, transport.from_next) if link is not None]
        outgoing = [link for link in (transport.to_previous, transport.to_next) if link is not None]
        return {
            "threads": len(_thread_names()),
            "incoming": len(incoming),
            "wrapped": sum(type(link.channel) is not GroupChannel for link in incoming),
            "wrapped outgoing": sum(type(link.channel) is not GroupChannel for link in outgoing),
            "patched": sum(vars(ProcessGroup)[name] is not value for name, value in self._collectives.items()),
            "followed": int(self._follows[-1] is not iter),
            "recorder": int(self._rank.recorder is not None),
        }


LAYOUTS = [
    "pp=3 v=2 layers=6",
    "pp=3 tp=2",
    pytest.param("pp=2 dp=2 sp tp=2", marks=pytest.mark.slow),
    pytest.param("pp=3 recompute", marks=pytest.mark.slow),
    pytest.param("pp=3 dp=2 zero=0", marks=pytest.mark.slow),
    pytest.param("pp=4 warmup=auto micro=6", marks=pytest.mark.slow),
    pytest.param("pp=3 gpipe hidden dynamic", marks=pytest.mark.slow),
    pytest.param("dp=2 zero=2", marks=pytest.mark.slow),
    pytest.param("dp=2 zero=3", marks=pytest.mark.slow),
    pytest.param("tp=2", marks=pytest.mark.slow),
    pytest.param("", marks=pytest.mark.slow),
    pytest.param("pp=2 bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_recording_changes_no_number_and_loses_nothing(layout: str, tmp_path: Path) -> None:
    micro = "" if "micro" in layout else " micro=3"
    config = make_config(layout + micro, f"run.dir={tmp_path}")
    without = run_ranks(config, _train, make_batches(config), False)
    recorded = run_ranks(config, _train, make_batches(config), True)
    for ours, theirs in zip(recorded, without, strict=True):
        assert (ours.losses, ours.grad_norms) == (theirs.losses, theirs.grad_norms)
        assert len(ours.weights) == len(theirs.weights)
        for (*place, values), (*same_place, expected) in zip(ours.weights, theirs.weights):
            assert place == same_place and torch.equal(values, expected)

    for seen in recorded:
        before, *during, after = seen.states
        assert len(during) == LAST - FIRST + 1
        for state in during:
            assert state["threads"] == state["wrapped"] == state["incoming"]
            assert state["patched"] > 10 and state["followed"] and state["recorder"]
            assert state["wrapped outgoing"] == 0
        assert not before["followed"]
        for state in (before, after):
            assert_untouched(state)
    for seen in without:
        for state in seen.states:
            assert not state["followed"]
            assert_untouched(state)

    analysis = Analysis.read(tmp_path)
    assert analysis.profile.plan.config == config
    assert analysis.profile.steps == (FIRST, LAST)
    assert_marks(analysis.profile)
    assert_sums(analysis)


def assert_untouched(state: dict[str, int]) -> None:
    """So that a run without a recording pays for none: nothing is in its way."""
    touched = ("threads", "wrapped", "wrapped outgoing", "patched", "recorder")
    assert [state[name] for name in touched] == [0] * len(touched)


def operations_of(profile: Profile, rank: int) -> list[Operation]:
    stage = profile.plan.stages[profile.plan.layout.coordinate(rank).pp_rank]
    return list(stage.operations(stage.actions))


def assert_marks(profile: Profile) -> None:
    """One behind each operation; each message arrives between its receive and when it is taken, and not before it is sent.

    All ranks have one clock here.
    """
    for record in profile.ranks:
        operations = operations_of(profile, record.rank)
        for step in record.steps:
            assert len(step.marks) == 2 + len(operations) + 6
            assert step.marks == sorted(step.marks)
            assert step.busy is not None and step.busy == sorted(step.busy)
            assert step.busy[-1] - step.busy[0] <= 1.01 * (step.marks[-1] - step.marks[0])
            assert step.process_busy >= step.busy[-1] - step.busy[0]
            ends = dict(zip([(one.verb, one.action, one.message) for one in operations], step.marks[2:]))
            receives = [one for one in operations if one.verb is Verb.RECEIVE]
            for arrival, receive in zip(step.arrivals, receives, strict=True):
                # It may be there before the rank that posts it goes on.
                begun = step.marks[1 + operations.index(receive)]
                assert begun <= arrival <= ends[Verb.AWAIT, receive.action, receive.message]
            for each in step.collectives:
                assert step.marks[0] <= each.entered <= each.wait_begun <= each.wait_ended <= step.marks[-1]

    for index in range(len(profile.steps)):
        for channel, sent in moments(profile, index, Verb.SEND).items():
            arrived = moments(profile, index, Verb.RECEIVE)[channel]
            assert len(sent) == len(arrived) and all(map(int.__le__, sent, arrived))


def moments(profile: Profile, index: int, verb: Verb) -> dict[tuple[int, int, Kind], list[int]]:
    """By channel, in its order: when each SEND of a step began, or when what was to RECEIVE arrived."""
    layout, found = profile.plan.layout, defaultdict(list)
    for record in profile.ranks:
        step, place, arrivals = record.steps[index], layout.coordinate(record.rank), iter(record.steps[index].arrivals)
        for operation, begin in zip(operations_of(profile, record.rank), step.marks[1:]):
            if operation.verb is not verb:
                continue
            is_send, kind = verb is Verb.SEND, operation.action.kind
            other = (place.pp_rank + (1 if is_send == (kind is Kind.FORWARD) else -1)) % layout.pp
            ends = record.rank, layout.global_rank(replace(place, pp_rank=other))
            found[(*(ends if is_send else ends[::-1]), kind)].append(begin if is_send else next(arrivals))
    return found


def assert_sums(analysis: Analysis) -> None:
    profile, layout = analysis.profile, analysis.profile.plan.layout
    for timeline, index in zip(analysis.timelines, range(len(profile.steps))):
        for record in profile.ranks:
            marks, pieces = record.steps[index].marks, timeline.pieces[record.rank]
            assert sum(piece.seconds for piece in pieces) == pytest.approx((marks[-1] - marks[0]) / 1e9, abs=1e-9)
            assert all(one.end == following.begin for one, following in zip(pieces, pieces[1:]))
        messages = sum(each.verb is Verb.SEND for rank in profile.ranks for each in operations_of(profile, rank.rank))
        assert len(timeline.deliveries) == messages
    assert len(analysis.account.boundaries) == 2 * len(profile.plan.boundary_bytes)
    for each in analysis.account.boundaries:
        assert each.sent_bytes == each.planned_bytes > 0
    path = analysis.path
    assert path[0].begin == 0 and all(one.end == following.begin for one, following in zip(path, path[1:]))
    spent = {cause.value: analysis.account.share_of(cause) > 0 for cause in Cause}
    assert spent["compute"] and spent["optimizer"]
    assert spent["tp"] == (layout.tp > 1)
    assert spent["dp"] == (layout.dp > 1)
    assert spent["embedding"] == (layout.pp > 1)


def test_marks_cover_the_steps_wall_clock(tmp_path: Path) -> None:
    """What a rank's marks span is what its steps took, seen from outside: nothing is left between them."""
    config = make_config("pp=3 micro=3", f"run.dir={tmp_path}")
    outside = run_ranks(config, _time_steps, make_batches(config))
    for record, seconds in zip(read_profile(tmp_path).ranks, outside, strict=True):
        for step, took in zip(record.steps, seconds[FIRST - 1 :], strict=True):
            assert 0 <= took - (step.marks[-1] - step.marks[0]) < 0.01 * took + BESIDE_A_STEP_NS


BESIDE_A_STEP_NS = 5_000_000  # a call or two, between which a busy machine may let others have the core


def _time_steps(rank: Rank, batches: list[Tensor]) -> list[int]:
    profiler, seconds = Profiler(rank, first=FIRST, last=LAST), []
    for step, batch in enumerate(batches, start=1):
        if step == FIRST:
            profiler._start()
        begun = time.monotonic_ns()
        if rank.recorder is not None:
            rank.recorder.begin()
        rank.train_step(batch, 1.0)
        ended = time.monotonic_ns()
        profiler.end()
        seconds.append(ended - begun)
    return seconds


# ---- ranks that fail


@pytest.mark.parametrize("how", ["kill", "raise"])
@pytest.mark.parametrize("recorded", [False, True], ids=["", "recorded"])
def test_a_rank_that_fails_is_named_and_felt_by_its_neighbours(how: str, recorded: bool, tmp_path: Path) -> None:
    """As without a recording: who waits for it gets the transport's error, on the thread that trains."""
    config = make_config("pp=3 micro=3", f"run.dir={tmp_path}", timeout_seconds=300)
    failure = "killed by SIGKILL" if how == "kill" else "ValueError: injected"
    with pytest.raises(RankFailed, match=f"rank 2 .* failed: {failure}"):
        run_ranks(config, _fail, make_batches(config)[0], how, recorded)
    felt = (tmp_path / "felt_by_1").read_text()
    assert felt.startswith("RuntimeError MainThread True") and "onnection" in felt
    with pytest.raises(ProfileError, match="no profile there"):
        read_profile(tmp_path)


def _fail(rank: Rank, batch: Tensor, how: str, recorded: bool) -> None:
    """The last stage, in its second step; rank 1 waits for its gradients."""
    profiler = Profiler(rank, first=1, last=3)
    try:
        for step in (1, 2):
            if recorded:
                profiler.begin(step)
            if step == 2 and dist.get_rank() == 2:
                time.sleep(1)  # until rank 1 waits: earlier its receives and sends would fail at once
                if how == "raise":
                    raise ValueError("injected")
                os.kill(os.getpid(), signal.SIGKILL)
            rank.train_step(batch, 1.0)
            if recorded:
                profiler.end()
    except RuntimeError as error:
        path = Path(rank.config.run.dir) / f"felt_by_{dist.get_rank()}"
        where = "in _await_input" in "".join(traceback.format_exception(error))
        path.write_text(f"{type(error).__name__} {threading.current_thread().name} {where} {error}")
        time.sleep(30)  # the one that failed is to be named
        raise


def test_a_recording_that_is_left_undoes_itself(tmp_path: Path) -> None:
    config = make_config("pp=2 micro=3", f"run.dir={tmp_path}")
    for state in run_ranks(config, _leave, make_batches(config)[0]):
        assert_untouched(state)
    with pytest.raises(ProfileError, match="no profile there"):
        read_profile(tmp_path)


def _leave(rank: Rank, batch: Tensor) -> dict[str, int]:
    state, profiler = _State(rank), Profiler(rank, first=1, last=3)
    profiler.begin(1)
    rank.train_step(batch, 1.0)
    profiler.end()
    profiler.close()
    rank.train_step(batch, 1.0)
    while _thread_names():
        time.sleep(0.001)
    return state.now()


# ---- faults

LATE_SECONDS = 0.03
FAULTY = "model.num_layers=8", "data.seq_length=64", "optim.max_grad_norm=0"


class LateBatch:
    """Rows that take long to come."""

    def __init__(self, batch: Tensor, seconds: float):
        self._batch, self._seconds = batch, seconds

    def __getitem__(self, rows: slice) -> Tensor:
        time.sleep(self._seconds)
        return self._batch[rows]

    @property
    def num_targets(self) -> None:
        """All."""


def _train_late(rank: Rank, batch: Tensor, forward: dict[int, float], data: dict[int, float]) -> None:
    """forward, data: seconds by rank for which each pass, each microbatch's rows take longer."""
    own = dist.get_rank()
    if own in forward:
        for chunk in rank.plan.chunks:
            rank.stage.chunk(chunk.chunk).register_forward_pre_hook(lambda *_: time.sleep(forward[own]))
    profiler = Profiler(rank, first=2, last=5)
    for step in range(1, 6):
        profiler.begin(step)
        rank.train_step(LateBatch(batch, data[own]) if own in data else batch, 0.0)
        profiler.end()


def first_sentence(tmp_path: Path, layout: str, *, forward: dict[int, float] = {}, data: dict[int, float] = {}) -> str:  # noqa: B006
    config = make_config(layout, *FAULTY, f"run.dir={tmp_path}")
    run_ranks(config, _train_late, make_batches(config)[0], forward, data)
    return Analysis.read(tmp_path).sentences[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_stage_that_computes_slowly_is_named(stage: int, tmp_path: Path) -> None:
    first = first_sentence(tmp_path, "pp=4 micro=6", forward={stage: LATE_SECONDS})
    assert f"to stage {stage} (rank {stage})" in first.split(";")[1]


@pytest.mark.slow
def test_a_stage_of_two_chunks_that_computes_slowly_is_named(tmp_path: Path) -> None:
    first = first_sentence(tmp_path, "pp=3 v=2 layers=6 micro=6", forward={1: LATE_SECONDS})
    assert "to stage 1 (rank 1)" in first.split(";")[1]


@pytest.mark.slow
def test_a_tensor_rank_that_computes_slowly_is_named(tmp_path: Path) -> None:
    first = first_sentence(tmp_path, "pp=2 tp=2 micro=6", forward={2: LATE_SECONDS})
    assert "to rank 2 (tensor rank 0 of stage 1)" in first.split(";")[1]


@pytest.mark.slow
def test_a_replica_that_computes_slowly_is_named(tmp_path: Path) -> None:
    first = first_sentence(tmp_path, "pp=2 dp=2 micro=6", forward={3: LATE_SECONDS})
    assert "to rank 3 (replica 1 of stage 1)" in first.split(";")[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("late", "who"), [((0,), "rank 0 (stage 0)"), ((2,), "rank 2 (stage 2)"), ((0, 1, 2), "all ranks")]
)
def test_a_late_data_loader_is_named(late: tuple[int, ...], who: str, tmp_path: Path) -> None:
    first = first_sentence(tmp_path, "pp=3 micro=4", data=dict.fromkeys(late, LATE_SECONDS))
    assert f"to the data loader of {who}" in first.split(";")[1]
