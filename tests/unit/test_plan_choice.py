"""What `plan` tells of chosen edges: kept and dropped ones with their weights, by hand and from the routers of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoint_stand_ins import write_checkpoint

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.cli.command_line import main
from lime_dist.config import load_config
from lime_dist.depth.pattern import parse_pattern, pattern_of_edges
from lime_dist.depth.routing import router_name
from lime_dist.plan.choice import MAX_GROUPS, EdgeChoice
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.selection import prior_weights
from lime_dist.plan.table import MAX_WIDTH, stage_table

RUN: dict[str, Any] = {
    "model": {"num_layers": 6, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "vocab_size": 16},
    "parallel": {"pp": 3},
    "data": {"global_batch_size": 1, "seq_length": 8},
    "run": {"device": "cpu", "steps": 9},
}
TRAINED = "trained/step_000007"
BY_HAND = {(1, 0): 2.0, (2, 0): 1.0, (2, 1): 3.0, (3, 0): 0.0, (3, 1): 1.5, (3, 2): 2.5}


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(RUN))


def plan(*overrides: str) -> RunPlan:
    return ready_plan(load_config("run.yaml", overrides))


def table_of(choice: EdgeChoice) -> list[str]:
    """The lines about the choice in the stage table of some plan."""
    made = plan()
    whole = stage_table(RunPlan(**{**vars(made), "choice": choice}))
    return whole.partition("\n\nedges of ")[2].splitlines()


def test_shares_by_hand() -> None:
    choice = EdgeChoice(
        pattern=pattern_of_edges({1: [0], 2: [1], 3: [1, 2]}, 4, "some"), weights=BY_HAND, how="by hand"
    )
    assert choice.total.weight_share == pytest.approx(9 / 10)
    assert [(kept.sources, kept.num_kept, kept.num_edges, kept.weight_share) for kept in choice.groups()] == [
        ((0,), 1, 1, 1.0),
        ((1,), 1, 2, 0.75),
        ((1, 2), 2, 3, 1.0),
    ]
    report = choice.report()
    assert (report["num_kept"], report["num_edges"], report["weight_share"]) == (4, 6, 0.9)
    assert report["readers"][1] == {
        "reader": 2,
        "weight_share": 0.75,
        "kept": [{"source": 1, "weight": 3.0}],
        "dropped": [{"source": 0, "weight": 1.0}],
    }
    assert table_of(choice) == [
        "some, chosen by hand: 4 of 6 kept, with 90.0 % of their weight",
        "readers  sources kept  kept  of  share of weight",
        "      1             0     1   1          100.0 %",
        "      2             1     1   2           75.0 %",
        "      3           1-2     2   3          100.0 %",
    ]


def test_many_readers_are_told_in_groups() -> None:
    choice = EdgeChoice(pattern=parse_pattern("stride:3", 128), weights=prior_weights(128), how=f"by {'x' * 200}")
    groups = choice.groups()
    assert len(groups) == MAX_GROUPS and [*groups[0].readers] == [*range(1, 9)] and groups[-1].readers.stop == 128
    assert sum(group.num_kept for group in groups) == choice.pattern.num_edges == choice.total.num_kept
    assert sum(group.num_edges for group in groups) == choice.total.num_edges == 128 * 127 // 2
    lines = table_of(choice)
    assert len(lines) <= MAX_GROUPS + 5 and max(map(len, lines)) <= MAX_WIDTH
    assert lines[-1].split()[0] == "121-127" and ", ..., " in lines[-1]


def magnitudes(values: Mapping[str, np.ndarray], reader: int) -> list[float]:
    """Mean |R| of a full pattern's reader, of each source but its own layer."""
    router = np.abs(values[f"weight:{router_name(reader)}"])
    return [float(router[:, source].mean()) for source in range(reader)]


def test_top_p_tells_what_it_kept_of_trained_routers() -> None:
    values = write_checkpoint(Path(TRAINED), tree=RUN)
    made = plan("depth.pattern=top_p:0.6", f"depth.weights_from={TRAINED}")
    assert made.choice is not None
    report = made.choice.report()
    assert report["how"] == f"by the routers of {TRAINED}"
    kept_sum, sum_of_all = 0.0, 0.0
    for one in report["readers"]:
        weights = magnitudes(values, one["reader"])
        found = {edge["source"]: edge["weight"] for edge in (*one["kept"], *one["dropped"])}
        assert found == pytest.approx(dict(enumerate(weights)))
        kept = [edge["source"] for edge in one["kept"]]
        assert (
            kept == made.config.pattern.edges[one["reader"]] == list(made.transfer.pattern.sources[one["reader"]][:-1])
        )
        kept_sum, sum_of_all = kept_sum + sum(weights[source] for source in kept), sum_of_all + sum(weights)
    assert report["weight_share"] == pytest.approx(kept_sum / sum_of_all) and 0.6 <= report["weight_share"] < 1
    assert report["num_edges"] == 15 and report["num_kept"] == made.transfer.pattern.num_edges < 15


def test_commands_print_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path(TRAINED), tree=RUN)
    chosen = ["run.yaml", "depth.pattern=budget:300", f"depth.weights_from={TRAINED}"]
    assert main(["plan", *chosen]) == 0
    told = capsys.readouterr().out
    assert f"edges of budget:300, chosen by the routers of {TRAINED}: " in told and "of their weight" in told
    assert main(["train", *chosen, "--dry-run"]) == 0
    assert told in capsys.readouterr().out
    assert main(["plan", *chosen, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen_edges"]["num_edges"] == 15
    for pattern in ("first:2", "within_stage", "{3: [0]}"):
        assert main(["plan", "run.yaml", f"depth.pattern={pattern}", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["chosen_edges"] is None
        assert main(["plan", "run.yaml", f"depth.pattern={pattern}"]) == 0
        assert "chosen" not in capsys.readouterr().out


def test_a_budget_without_routers_has_no_weights() -> None:
    made = plan("depth.pattern=budget:300")
    assert made.choice is not None and made.choice.total.weight_share is None
    assert made.choice.report()["readers"][0]["kept"] == [{"source": 0, "weight": None}]
    assert "edges of budget:300, chosen by nearness, as depth.weights_from names no checkpoint: " in stage_table(made)
    assert "weight" not in stage_table(made).partition("names no checkpoint")[2]


def test_edges_of_an_earlier_start_are_told_as_those() -> None:
    """A run that goes on has them from its checkpoint, a resolved config from itself."""
    write_checkpoint(Path(TRAINED), tree=RUN)
    edges = {"pattern": {1: [0], 3: [0, 2]}, "pattern_name": "top_p:0.6", "weights_from": TRAINED}
    going_on = {**RUN, "depth": edges, "run": {**RUN["run"], "dir": "run"}}
    Path("resolved.yaml").write_text(yaml.safe_dump(going_on))
    line = "edges of top_p:0.6, chosen at an earlier start, as {} them: 3 of 15 kept"
    assert line.format("the config has") in stage_table(ready_plan(load_config("resolved.yaml")))
    write_checkpoint(Path("run/checkpoints/step_000005"), step=5, tree=going_on)
    again = plan("run.dir=run", "depth.pattern=top_p:0.6", f"depth.weights_from={TRAINED}")
    assert line.format("checkpoint run/checkpoints/step_000005 has") in stage_table(again)


def test_a_switch_tells_what_the_runs_own_routers_kept() -> None:
    folder = Path("run/checkpoints/step_000005")
    last_2 = {**RUN, "depth": {"pattern": "last:2"}}
    write_checkpoint(folder, step=5, tree=last_2)
    made = plan("run.dir=run", "depth.pattern=last:2", "depth.switch_at={5: top_p:0.5}")
    assert made.choice is not None and made.choice.how == f"by the routers of {folder}"
    assert made.choice.total.num_edges == parse_pattern("last:2", 6).num_edges == 9
    assert {edge["source"] for edge in made.choice.report()["readers"][4]["dropped"]} <= {3, 4}
