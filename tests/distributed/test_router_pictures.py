"""The router map that ranks gather is that of the whole model's routers, to the last bit; a run writes it as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from common import SHORT, make_config, make_plain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.analysis.routers import map_of_routers
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter
from lime_dist.depth.routing import router_name
from lime_dist.lime.values import gather_logical
from lime_dist.testing import run_ranks
from lime_dist.training.rank import TORCH_DTYPES, Rank
from lime_dist.training.router_pictures import gather_router_map

LAYOUTS = [
    "pp=3 layers=6 split=[2,2,2]",  # routers of a reader are spread over stages
    "pp=3 layers=6 split=[1,2,3] pattern=first:2",
    "pp=2 v=2 layers=8 micro=2",
    "tp=2",
    "tp=2 pp=2 kv=2 sp",
    "dp=2 zero=3 kv=2",
    "dp=2 pp=2 zero=1",
    "zero=0 dp=2",
    "pp=2 hidden",
    "tp=2 pp=2 hidden",
    "dp=2 zero=3 hidden",
    "pp=2 bf16",
]


def gathered(rank: Rank) -> list | None:
    found = gather_router_map(rank)
    return None if found is None else found.by_head.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_whole_models_routers(layout: str) -> None:
    config = make_config(layout)
    ranks = run_ranks(config, gathered)
    dtype = TORCH_DTYPES[config.run.dtype]  # whose values the optimiser's fp32 ones begin with
    weights = gather_logical(make_plain(config), lambda parameter: parameter.detach().to(dtype).float())
    readers = range(1, config.model.num_layers)
    expected = map_of_routers(config.pattern, {layer: weights[router_name(layer)].numpy() for layer in readers})
    assert np.nanmax(expected.by_head) > 0.1
    for found in ranks:
        assert np.array_equal(np.array(found), expected.by_head, equal_nan=True)


@pytest.mark.parametrize("words", ["llama", "hidden dynamic"])
def test_no_map_where_there_are_no_static_routers(words: str) -> None:
    assert run_ranks(make_config(f"pp=2 {words}"), gathered) == [None, None]


def test_a_run_writes_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with IndexedWriter(tmp_path / "train", vocab_size=96) as writer:
        writer.add_document(np.arange(2000) % 96)
        writer.commit({"vocab_size": 96, "tokens": 2000})
    tree = {
        "model": {"num_layers": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96},
        "data": {"train": "train", "seq_length": 8, "global_batch_size": 2},
        "optim": {"warmup_steps": 0},
        "run": {"dir": "run", "steps": 5, "device": "cpu", "timeout_seconds": 60},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert main(["train", "run.yaml", f"{SHORT['pp']}=2", "analysis.every=2"]) == 0
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    pictures = board.Images("routers/mean")
    assert [picture.step for picture in pictures] == [2, 4]
    assert all(picture.width > 200 and picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0].encoded_image_string != pictures[1].encoded_image_string
