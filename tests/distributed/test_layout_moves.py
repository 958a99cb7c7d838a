"""A checkpoint moves between layouts: what is loaded is what was saved, to the bit, and training goes on as if it had
never moved; and each rank reads its own share of the files.

The words of a row are those of `common.SHORT`; a word that is missing has the default of `common.BASE`. Everything here
is fp32.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import pytest
from common import TOLERANCE, make_batches, make_config

from lime_dist.checkpoint.chunk_files import Chunk, ChunkFiles
from lime_dist.checkpoint.loading import load_checkpoint
from lime_dist.checkpoint.reader import CheckpointReader, step_folder
from lime_dist.checkpoint.saving import Progress, Saver
from lime_dist.checkpoint.upkeep import tensor_differences
from lime_dist.config import Config
from lime_dist.lime.values import specified_parameters
from lime_dist.plan.tensors import KINDS
from lime_dist.testing import run_ranks
from lime_dist.training.rank import Rank, require_finite
from lime_dist.training.spikes import Action, SpikeState, Verdict

pytestmark = pytest.mark.slow

# Odd vocabularies: each layout pads them to another size, and tensor ranks hold real rows, padding, or both.
KV = "layers=7 heads=8 kv=4 vocab=301"
KV_UNTIED = "layers=7 heads=4 kv=2 vocab=301 untied pattern=first:2+last:3"
HIDDEN = "hidden layers=6 vocab=201"
DYNAMIC = "hidden dynamic layers=6 heads=4 kv=2 vocab=201 untied"

# model, saved under, loaded under; one of the two has three stages or more
MOVES = (
    # to fewer stages and more, tensor ranks, replicas under each ZeRO stage, virtual stages
    (KV, "pp=3 dp=2 split=[1,4,2] micro=3", "pp=2 tp=2 v=2 micro=4 sp"),
    (KV, "pp=3 dp=2 split=[1,4,2] micro=3", "pp=4 zero=0 micro=6 relay gpipe"),
    (KV, "pp=3 dp=2 split=[1,4,2] micro=3", "tp=4 zero=0"),  # 128, 128, 45 and 0 rows of the vocabulary
    (KV, "pp=3 dp=2 split=[1,4,2] micro=3", "dp=3 zero=3 micro=2"),
    (KV, "dp=3 zero=3 micro=2", "pp=3 tp=2 micro=3 split=[3,1,3] relay"),
    (KV, "dp=3 zero=3 micro=2", "pp=3 v=2 tp=2 zero=0 micro=6"),
    # from virtual stages to plain ones, and back
    (KV_UNTIED, "pp=3 v=2 micro=3", "pp=3 tp=2 zero=0 split=[2,2,3]"),
    (KV_UNTIED, "pp=3 v=2 micro=3", "pp=5 split=[1,2,1,2,1] micro=6 warmup=auto"),
    (KV_UNTIED, "pp=3 v=2 micro=3", "tp=2 dp=2 zero=2"),
    (KV_UNTIED, "tp=2 dp=2 zero=2", "pp=3 v=2 split=[1,1,1,1,2,1] micro=3 relay"),
    (KV_UNTIED, "tp=2 dp=2 zero=2", "pp=4 dp=2 micro=3"),
    # hidden states as entries
    (HIDDEN, "pp=3 tp=2 sp split=[3,1,2] micro=2 relay", "pp=2 dp=2 micro=2"),
    (HIDDEN, "pp=3 tp=2 sp split=[3,1,2] micro=2 relay", "pp=2 v=3 zero=0 micro=4"),
    (HIDDEN, "pp=3 tp=2 sp split=[3,1,2] micro=2 relay", "tp=2 dp=2 zero=3 sp"),
    (DYNAMIC, "pp=3 dp=2 zero=0 micro=2", "pp=3 v=2 dp=2 micro=3 relay"),
    (DYNAMIC, "pp=3 dp=2 zero=0 micro=2", "tp=2 dp=2"),
    (DYNAMIC, "pp=3 dp=2 zero=0 micro=2", "pp=6 zero=0 micro=2"),
)
STAYS = (
    (KV, "pp=3 dp=2 split=[1,4,2] micro=3"),
    (KV_UNTIED, "pp=3 v=2 micro=3"),
    (HIDDEN, "pp=3 tp=2 sp split=[3,1,2] micro=2 relay"),
    (DYNAMIC, "pp=3 dp=2 zero=0 micro=2"),
)

SAVED_STEP, LAST_STEP = 3, 6
SKIPPED_STEP = 2  # no update: the count of updates, which AdamW's bias correction needs, is not the step
# Of a tensor's largest magnitude: updates enlarge what the order of sums does, and squares double it (here to 4e-6).
STATE_TOLERANCE = 3 * TOLERANCE
LR_FACTORS = (1.0, 0.5, 0.8, 1.0, 0.6, 0.9)
SPIKES = SpikeState(
    losses=(0.1 + 0.2, 1 / 3),
    grad_norms=(1e-30, 7.0),
    bad_steps=(SKIPPED_STEP,),
    num_skipped=1,
    num_returns=2,
    samples_passed_over=24,
)


# ---- on a rank


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps after the checkpoint."""

    losses: list[float]
    grad_norms: list[float]


@dataclass(frozen=True, kw_only=True)
class Move:
    """A rank's part. stage_bytes: of all that its replicas hold together, padding left out."""

    steps: Steps
    replicas: tuple[int, int]  # pp_rank and tp_rank: the same on those that are replicas of each other
    bytes_read: int
    stage_bytes: int


def begin(rank: Rank, checkpoints: Path) -> Steps:
    """Steps to a checkpoint, and on to another."""
    make_steps(rank, 1, SAVED_STEP)
    save(rank, checkpoints, SAVED_STEP)
    return go_on(rank, checkpoints)


def move(rank: Rank, source: Path, checkpoints: Path) -> Move:
    """From the checkpoint in the middle of `begin`, which is at once saved again."""
    with counted_reads() as sizes:
        meta = load_checkpoint(rank, step_folder(source, SAVED_STEP))
    Saver(checkpoints).save(rank, Progress(meta.step, meta.samples_seen, meta.spikes))
    place = rank.groups.coordinate
    return Move(
        steps=go_on(rank, checkpoints),
        replicas=(place.pp_rank, place.tp_rank),
        bytes_read=sum(sizes),
        stage_bytes=stage_bytes(rank),
    )


def go_on(rank: Rank, checkpoints: Path) -> Steps:
    steps = make_steps(rank, SAVED_STEP + 1, LAST_STEP)
    save(rank, checkpoints, LAST_STEP)
    return steps


def save(rank: Rank, checkpoints: Path, step: int) -> None:
    samples_seen = step * rank.config.data.global_batch_size
    Saver(checkpoints).save(rank, Progress(step, samples_seen, SPIKES))


def make_steps(rank: Rank, first: int, last: int) -> Steps:
    batches = make_batches(rank.config, LAST_STEP)
    results = [
        rank.train_step(batches[step - 1], LR_FACTORS[step - 1], judge=skip if step == SKIPPED_STEP else require_finite)
        for step in range(first, last + 1)
    ]
    return Steps(losses=[result.loss for result in results], grad_norms=[result.grad_norm for result in results])


def skip(loss: float, grad_norm: float) -> Verdict:
    return Verdict(action=Action.SKIP)


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """The bytes of each chunk that is read meanwhile."""
    sizes: list[int] = []
    read = ChunkFiles.read

    def counted(files: ChunkFiles, chunk: Chunk) -> np.ndarray:
        values = read(files, chunk)
        sizes.append(values.nbytes)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkFiles, "read", counted)
        yield sizes


def stage_bytes(rank: Rank) -> int:
    """fp32 weights and moments of this rank's parameters, whole."""
    pieces = [(spec, piece) for spec, _ in specified_parameters(rank.stage) for piece in spec.pieces]
    elements = sum(piece.length * prod(spec.shape) // spec.shape[piece.dim] for spec, piece in pieces)
    return elements * 4 * len(KINDS)


# ---- runs


@dataclass(frozen=True, kw_only=True)
class Run:
    config: Config
    checkpoints: Path
    steps: Steps


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The undisturbed run of a config, made once."""

    @cache
    def run_of(text: str, *more: str) -> Run:
        config, checkpoints = make_config(text, *more), tmp_path_factory.mktemp("begun")
        first, *others = run_ranks(config, begin, checkpoints)
        assert others == [first] * len(others), "ranks disagree"
        assert_every_tensor_changes(checkpoints)
        return Run(config=config, checkpoints=checkpoints, steps=first)

    return run_of


def assert_every_tensor_changes(checkpoints: Path) -> None:
    """Of every kind, in the steps after the checkpoint: else one that is not saved, or not loaded, might not show."""
    before, after = readers = [CheckpointReader(step_folder(checkpoints, step)) for step in (SAVED_STEP, LAST_STEP)]
    assert [reader.kinds for reader in readers] == [KINDS, KINDS]
    assert len(list(tensor_differences(before, after))) == len(KINDS) * len(before.tensors)


def moved(run: Run, config: Config, checkpoints: Path) -> list[Move]:
    moves = run_ranks(config, move, run.checkpoints, checkpoints)
    assert [each.steps for each in moves] == [moves[0].steps] * len(moves), "ranks disagree"
    assert_same_state(run.checkpoints, checkpoints, SAVED_STEP)
    return moves


def assert_same_state(ours: Path, theirs: Path, step: int) -> None:
    """Every weight and both its moments to the bit, and all that is counted."""
    left, right = (CheckpointReader(step_folder(folder, step)) for folder in (ours, theirs))
    assert left.kinds == right.kinds == KINDS and left.tensors == right.tensors
    assert list(tensor_differences(left, right)) == []
    counts = [(reader.meta.step, reader.meta.samples_seen, reader.meta.spikes) for reader in (left, right)]
    assert counts[0] == counts[1]


def assert_goes_on_alike(run: Run, steps: Steps, checkpoints: Path) -> None:
    """To the order of sums: losses, gradient norms, and every weight and moment in the end."""
    assert steps.losses == pytest.approx(run.steps.losses, rel=TOLERANCE)
    assert steps.grad_norms == pytest.approx(run.steps.grad_norms, rel=TOLERANCE)
    left, right = (CheckpointReader(step_folder(folder, LAST_STEP)) for folder in (run.checkpoints, checkpoints))
    for found in tensor_differences(left, right):
        assert found.largest <= STATE_TOLERANCE * found.magnitude, found


# ---- tests


@pytest.mark.parametrize(("model", "layout", "other"), MOVES)
def test_a_run_moves(model: str, layout: str, other: str, begun: Callable[..., Run], tmp_path: Path) -> None:
    run = begun(f"{model} {layout}")
    first, *_ = moved(run, make_config(f"{model} {other}"), tmp_path)
    assert_goes_on_alike(run, first.steps, tmp_path)


@pytest.mark.parametrize(("model", "layout"), STAYS)
def test_a_run_that_stays_goes_on_to_the_bit(
    model: str, layout: str, begun: Callable[..., Run], tmp_path: Path
) -> None:
    run = begun(f"{model} {layout}")
    first, *_ = moved(run, run.config, tmp_path)
    assert first.steps == run.steps
    assert_same_state(run.checkpoints, tmp_path, LAST_STEP)


# Chunks are of half a MiB: a replica's share, whose ends lie somewhere within one, has to be several MiB.
LARGE = "layers=3 heads=8 kv=4 vocab=4000", "model.hidden_size=512", "model.intermediate_size=1536"


@pytest.mark.parametrize("other", ["pp=3 dp=2 zero=1", "dp=4 zero=2", "dp=2 zero=3"])
def test_replicas_read_their_shares(other: str, begun: Callable[..., Run], tmp_path: Path) -> None:
    model, *sizes = LARGE
    config = make_config(f"{model} {other}", *sizes)
    run = begun(f"{model} pp=3 tp=2", *sizes)
    moves = moved(run, config, tmp_path)
    assert_goes_on_alike(run, moves[0].steps, tmp_path)

    together: dict[tuple[int, int], int] = defaultdict(int)
    for each in moves:
        assert each.bytes_read <= 1.1 * each.stage_bytes / config.layout.dp
        together[each.replicas] += each.bytes_read
    for each in moves:
        assert each.stage_bytes <= together[each.replicas] <= 1.1 * each.stage_bytes
    shutil.rmtree(tmp_path)  # 0.3 GB, which pytest would keep
