"""Hidden-state routing (LIMe v1) under layouts: as `test_layouts`, and checkpoints from one layout to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import TOLERANCE, assert_equals_the_single_process, make_batches, make_config, weight_of

from lime_dist.checkpoint.edges import resolve_pattern
from lime_dist.checkpoint.loading import load_checkpoint
from lime_dist.checkpoint.saving import Progress, Saver
from lime_dist.config import Config
from lime_dist.errors import CheckpointError
from lime_dist.generate import load_model
from lime_dist.lime.model import model_loss
from lime_dist.testing import Pieces, assemble, local_pieces, run_ranks
from lime_dist.training.rank import Rank

LAYOUTS = (
    "micro=3 recompute zero=0",
    "zero=2 micro=2 dynamic",
    "zero=3 dp=2 micro=2 dynamic heads=4 kv=2 recompute",
    "tp=2 seq=5 batch=3 micro=3",  # 5 tokens: the last row of the last rank is padding
    "tp=2 sp micro=2 dynamic recompute",
    "tp=4 heads=8 kv=4 seq=5 batch=3 micro=3 dynamic",  # 5 tokens in rows of 2: the last rank has padding alone
    "tp=2 dp=2 sp pattern=stride:2 heads=4 kv=2 micro=3 zero=0",
    "pp=2 split=[1,3] micro=3",  # the first stage has no router
    "pp=2 split=[1,3] micro=2 dynamic zero=0 policy=relay",
    "pp=2 tp=2 sp micro=3 dynamic heads=4 kv=2 recompute",
    "pp=2 dp=2 tp=2 micro=2 pattern=last:2 untied policy=least",
    "pp=3 layers=5 split=[1,3,1] micro=4 pattern=first:2 dynamic policy=least",
    "pp=3 layers=6 split=[3,1,2] micro=3 recompute gpipe policy=relay",
    "pp=3 tp=2 layers=5 micro=2 pattern=stride:2 dynamic seq=5 batch=2",
    "pp=4 layers=7 split=[1,3,2,1] micro=3 pattern=last:2",
    "pp=2 layers=6 split=[2,4] micro=2 pattern=block:2 dynamic tp=2",
    "pp=4 micro=3 dynamic zero=0 dp=2",
)


@pytest.mark.parametrize("text", LAYOUTS)
def test_layout_equals_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_config(f"hidden {text}"))


# ---- checkpoints


def step_and_save(rank: Rank, batches: list[torch.Tensor], folder: Path) -> tuple[Pieces, float]:
    """The weights saved after a step, and the loss of the next."""
    rank.train_step(batches[0], 1.0)
    Saver(folder).save(rank, Progress(step=1, samples_seen=12))
    return local_pieces(rank, weight_of(rank)), rank.train_step(batches[1], 1.0).loss


def load_and_step(rank: Rank, batches: list[torch.Tensor], folder: Path) -> tuple[Pieces, list[float]]:
    """The weights loaded, and the losses of the next two steps: the second one's shows the moments."""
    load_checkpoint(rank, folder)
    weights = [(*place, values.clone()) for *place, values in local_pieces(rank, weight_of(rank))]
    return weights, [rank.train_step(batch, 1.0).loss for batch in batches[1:]]


def saved(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    results = run_ranks(config, step_and_save, make_batches(config), folder)
    return assemble([pieces for pieces, _ in results])


@pytest.mark.parametrize("router", ["", "dynamic"])
def test_a_checkpoint_loads_on_another_layout_and_with_fewer_edges(router: str, tmp_path: Path) -> None:
    writer = make_config(f"hidden {router} pp=2 tp=2 micro=2")
    weights = saved(writer, tmp_path)
    whole = run_ranks(
        make_config(f"hidden {router} pp=3 sp tp=2 split=[1,1,2] micro=3"),
        load_and_step,
        make_batches(writer),
        tmp_path / "step_000001",
    )
    loaded = assemble([pieces for pieces, _ in whole])
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    again = run_ranks(writer, load_and_step, make_batches(writer), tmp_path / "step_000001")
    assert whole[0][1] == pytest.approx(again[0][1], rel=TOLERANCE)

    fewer = run_ranks(
        make_config(f"hidden {router} pp=2 pattern=last:1"),
        load_and_step,
        make_batches(writer),
        tmp_path / "step_000001",
    )
    cut = assemble([pieces for pieces, _ in fewer])["layers.3.self_attn.lime_router.weight"]
    full = weights["layers.3.self_attn.lime_router.weight"]
    by_source = full.view(4, 4, -1)[:, 2:]
    assert torch.equal(cut, by_source.reshape(cut.shape))

    model, config = load_model(tmp_path / "step_000001", torch.device("cpu"))
    assert config.depth.routing == writer.depth.routing
    with torch.no_grad():
        loss = float(model_loss(model, make_batches(writer)[1]))
    assert loss == pytest.approx(again[0][1][0], rel=TOLERANCE)


def test_top_p_takes_the_largest_shares_and_dynamic_routers_choose_nothing(tmp_path: Path) -> None:
    config = make_config("hidden")
    weights = saved(config, tmp_path / "static")
    chosen = resolve_pattern(config.with_pattern("top_p:0.6"), trained=tmp_path / "static" / "step_000001").pattern
    shares = weights["layers.3.self_attn.lime_router.weight"].softmax(-1).mean(0)[:-1]
    largest = int(shares.argmax())
    assert largest in chosen.sources[3] and len(chosen.sources[3]) < 4
    assert chosen.routing == config.depth.routing

    dynamic = make_config("hidden dynamic")
    saved(dynamic, tmp_path / "dynamic")
    budget = replace(config, depth=replace(config.depth, pattern="budget:1MiB"))
    with pytest.raises(CheckpointError, match=r"depth.weights_from: the routers of .* \(dynamic\) cannot rank edges"):
        resolve_pattern(budget, trained=tmp_path / "dynamic" / "step_000001")
