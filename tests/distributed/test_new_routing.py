"""A further kind of depth routing is its two halves and nothing in the package: here DenseFormer's, made in the test.

The input of a layer's attention is a sum, with a learned weight each, of the normed inputs of its sources (after
DenseFormer, arXiv 2402.02622). Without tensor ranks, which would ask it to bring tokens back together.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from common import TOLERANCE, assert_equals_the_single_process, make_batches, make_config, make_plain
from torch import Tensor

from lime_dist.checkpoint.edges import resolve_pattern
from lime_dist.checkpoint.loading import load_checkpoint
from lime_dist.checkpoint.saving import Progress, Saver
from lime_dist.config import Config, ModelConfig
from lime_dist.depth.kinds import ROUTINGS
from lime_dist.depth.routing import ModelSizes, Read, Routing
from lime_dist.errors import ConfigError
from lime_dist.lime.layers import Attention, OwnAttention, Pass
from lime_dist.lime.model import DEPTHS, model_loss
from lime_dist.lime.parts import Parts
from lime_dist.lime.summed import Router, SummedDepth
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.table import plan_report
from lime_dist.plan.tensors import Cutter, LogicalTensor, Normal, ParameterSpec, Role
from lime_dist.testing import Pieces, assemble, local_pieces, run_ranks
from lime_dist.training.rank import Rank

# ---- the kind


@dataclasses.dataclass(frozen=True)
class DenseRouting(Routing):
    """Routers [1, sources, 1]."""

    name = "dense"
    entry_name = "normed input"
    presummable = True

    def entry_shape(self, model: ModelSizes, rows: int) -> tuple[int, int]:
        return 1, rows * model.hidden_size

    def router(self, cut: Cutter, name: str, model: ModelSizes, read: Read) -> ParameterSpec:
        tensor = LogicalTensor(read.router_name, (1, len(read.sources), 1), Role.ROUTER, Normal(std=0.5))
        return cut.places(name, tensor, [read.sources.index(source) for source in read.here])

    def read_flops(self, model: ModelSizes) -> int:
        return 2 * model.hidden_size

    def kept_bytes(self, model: ModelSizes, num_sources: int, rows: int, element_bytes: int) -> int:
        """Queries beside keys and values: all are views of one projection."""
        return rows * model.num_heads * model.head_dim * element_bytes


class DenseAttention(OwnAttention):
    def __init__(self, model: ModelConfig, layer: int, router: Router | None, parts: Parts):
        super().__init__(model, layer, parts)
        self.lime_router = router

    def project(self, residual: Tensor, normed: Tensor, chain: Tensor, run: Pass) -> tuple[Tensor, Tensor, Tensor]:
        chain = run.memory.write(self.layer, normed, chain)
        if self.lime_router is not None:
            own = self.lime_router.own
            normed = run.memory.read(self.layer, self.lime_router.weight_of(own), own, chain).view(normed.shape)
        return super().project(residual, normed, chain, run)


class DenseDepth(SummedDepth):
    def routed(self, layer: int) -> Attention:
        return DenseAttention(self.model, layer, self.routers.get(layer), self.parts)


DENSE = DenseRouting()


@pytest.fixture(autouse=True)
def known_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forks, which know what the test knows."""
    monkeypatch.setitem(ROUTINGS, ("dense", "static"), DENSE)
    monkeypatch.setitem(DEPTHS, DenseRouting, DenseDepth)


def make_dense(text: str) -> Config:
    return make_config(text, "depth.entry=dense")


# ---- what follows


@pytest.mark.parametrize(
    "text",
    [
        "pp=2 micro=3",
        "pp=2 micro=2 relay recompute dp=2",
        "pp=2 v=2 micro=4 layers=6",
        "pp=3 layers=6 split=[3,1,2] micro=2 pattern=first:2 zero=0",
    ],
)
def test_layout_equals_the_single_process(text: str) -> None:
    assert_equals_the_single_process(make_dense(text))


def test_the_single_process_reads_what_its_routers_say() -> None:
    """With all weight on a layer's own input it is LLaMA, and with some on another's it is not."""
    dense, llama = make_plain(make_dense("")), make_plain(make_config("llama"))
    routers = [dense.get_parameter(f"layers.{reader}.self_attn.lime_router.weight") for reader in range(1, 4)]
    batch = make_batches(make_dense(""))[0]
    with torch.no_grad():
        for router in routers:
            router.zero_()[:, -1] = 1
        expected = float(model_loss(llama, batch))
        assert float(model_loss(dense, batch)) == pytest.approx(expected, rel=TOLERANCE)
        routers[-1][:, 0] = 1
        assert float(model_loss(dense, batch)) != pytest.approx(expected, rel=TOLERANCE)


def test_the_plan_is_the_least_with_its_own_sizes() -> None:
    report = plan_report(plan_run(make_dense("pp=2 split=[3,1]")))
    assert report["totals"] == {"least": 1, "relay": 3}
    (hop,) = report["hops"]
    assert hop["entry_bytes"] == hop["residual_bytes"]
    assert sum(stage["routing_flops_per_token"] for stage in report["stages"]) == 2 * 32 * (2 + 3 + 4)
    (dense,), (key_value,) = (plan_report(plan_run(config))["stages"] for config in (make_dense(""), make_config("")))
    more = dense["memory_bytes"]["activations"] - key_value["memory_bytes"]["activations"]
    assert more == 3 * 12 * 6 * 32 * 4  # readers, sequences, tokens, hidden, fp32


def save(rank: Rank, folder: Path) -> Pieces:
    Saver(folder).save(rank, Progress(step=1, samples_seen=12))
    return local_pieces(rank, lambda parameter: parameter)


def load(rank: Rank, folder: Path) -> Pieces:
    load_checkpoint(rank, folder)
    return local_pieces(rank, lambda parameter: parameter)


def test_a_checkpoint_loads_with_fewer_edges_and_its_routers_rank_them(tmp_path: Path) -> None:
    saved = assemble(run_ranks(make_dense("pp=2 micro=2"), save, tmp_path))
    loaded = assemble(run_ranks(make_dense("pp=3 split=[1,1,2] pattern=last:1"), load, tmp_path / "step_000001"))
    name = "layers.3.self_attn.lime_router.weight"
    assert torch.equal(loaded[name], saved[name][:, 2:])
    chosen = resolve_pattern(make_dense("").with_pattern("top_p:0.1"), trained=tmp_path / "step_000001").pattern
    assert chosen.sources[3] == (int(saved[name][0, :3].abs().argmax()), 3)
    assert chosen.routing == DENSE


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth.entry=dense; set depth.entry=hidden, or depth.router=static"):
        make_dense("dynamic")
    with pytest.raises(ConfigError, match="depth.entry: 'sparse' is unknown; use kv or hidden or dense"):
        make_config("", "depth.entry=sparse")
