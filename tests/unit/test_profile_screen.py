"""What `lime-dist profile` shows and refuses: one screen of 120 columns, the same as JSON, and errors of one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from recorded import BASE, MS, RankClock, Times, make_plan, recorded, write
from test_profile_files import make_profile

from lime_dist.cli.command_line import main
from lime_dist.config import check_config, parse_config
from lime_dist.config.checking import find_warnings
from lime_dist.errors import USER_ERROR_EXIT_CODE, ConfigError
from lime_dist.profiling.analysis import Analysis
from lime_dist.profiling.profile_files import MeasuredLink, Profile
from lime_dist.profiling.screen import MAX_RANKS, WIDTH, profile_report, profile_screen
from lime_dist.profiling.timeline import Cause


def screen_of(profile: Profile) -> str:
    found = Analysis(profile)
    return profile_screen(profile, found.account, found.path, found.sentences)


def busy(slower: int) -> Times:
    """Of every cause something. slower: times as long as tens of ms."""
    unit = slower * MS
    return Times(
        run=lambda rank, operation: 10 * unit,
        link=lambda *way: 13 * unit,
        data=lambda rank: 3 * unit,
        phase=lambda rank, phase: 2 * unit,
        host=lambda: unit,
        tensor=lambda: unit,
        others=lambda: unit,
    )


def without_core(profile: Profile) -> Profile:
    """Half of the time others had the core."""
    ranks = [
        replace(
            record,
            steps=tuple(replace(step, busy=[mark // 2 for mark in step.marks]) for step in record.steps),
        )
        for record in profile.ranks
    ]
    return replace(profile, ranks=tuple(ranks))


# ---- width


@pytest.mark.parametrize("slower", [1, 50, 1_500])
def test_it_fits_the_screen(slower: int) -> None:
    """All columns, of steps of a second, of a minute and of an hour; messages of many GiB; names of patterns may be long."""
    plan = make_plan(
        "parallel.pp=4", "parallel.tp=2", "parallel.dp=2", "data.seq_length=131072", "model.hidden_size=16384",
        "model.num_heads=128", "depth.pattern={7: [0, 1, 2, 3, 4, 5, 6], 6: [0, 1, 2, 3, 4, 5]}" if slower == 1 else "depth.pattern=full",
    )  # fmt: skip
    links = [MeasuredLink(from_stage=stage, to_stage=stage + 1, bytes_per_second=123.4e9) for stage in range(3)]
    clocks = {1: RankClock(ahead=10**15, drift=1e-4, error=123_456)}
    profile = without_core(recorded(plan, busy(slower), links=links, clocks=clocks))
    lines = screen_of(profile).splitlines()
    assert max(map(len, lines)) <= WIDTH
    (table,) = (line for line in lines if line.startswith("rank"))
    assert [name for name in table.split() if name != "queue"] == [
        "rank", "stage", "step", "compute", "bubble", "transfer", "tp", "dp", "embed", "agree", "optim", "data",
        "host", "no", "core",
    ]  # fmt: skip
    assert len(lines) <= 45
    assert "GiB" in screen_of(profile) and "114.9 GiB/s" in screen_of(profile)


# ---- what it says


def test_its_numbers_are_those_of_the_accounts() -> None:
    profile = recorded(make_plan("parallel.pp=2"), busy(1))
    text, found = screen_of(profile), Analysis(profile).account
    assert text.splitlines()[0].startswith(
        "step 1 of tp=1 pp=2 dp=1, 1f1b, 4 microbatches, pattern full, policy least, on CPU"
    )
    assert "times are of the mean step, in tables in ms; clocks of ranks: one clock" in text
    rows = [line.split() for line in text.splitlines()]
    for rank in found.ranks:
        (row,) = (row for row in rows if row[:2] == [str(rank.rank), str(rank.stage)])
        shown = [cause for cause in Cause if any(one.seconds[cause] > 0 for one in found.ranks)]
        assert [float(cell) for cell in row[2:]] == pytest.approx(
            [1e3 * rank.step_seconds, *(1e3 * rank.seconds[cause] for cause in shown)], abs=0.05
        )
        assert sum(float(cell) for cell in row[3:]) == pytest.approx(float(row[2]), abs=1)
    for each in found.boundaries:
        (row,) = (row for row in rows if row[:1] == [each.name])
        assert float(row[6]) == pytest.approx(1e3 * each.busy, abs=0.05)


def test_of_many_ranks_the_slowest_of_each_stage_are_shown() -> None:
    plan = make_plan("parallel.pp=2", "parallel.dp=16", "pipeline.num_microbatches=1", "data.global_batch_size=16")
    slow = {5, 20}
    profile = recorded(plan, Times(run=lambda rank, operation: (13 if rank in slow else 10) * MS))
    text = screen_of(profile)
    assert plan.layout.world_size > MAX_RANKS
    rows = [line.split() for line in text.splitlines()]
    begin = next(index for index, row in enumerate(rows) if row[:2] == ["rank", "stage"])
    assert [row[:2] for row in rows[begin + 1 : begin + 3]] == [["5", "0"], ["20", "1"]]
    assert "30 more ranks: of each stage the one that computes longest is shown" in text


def test_clocks_are_told_with_their_error() -> None:
    clocks = {1: RankClock(error=41_000, drift=2e-5)}
    assert "clocks of ranks: to 41 us, drift 20.0 us/s" in screen_of(
        recorded(make_plan("parallel.pp=2"), clocks=clocks)
    )


@pytest.mark.parametrize("overrides", [(), ("parallel.tp=2",), ("parallel.dp=2",)], ids=str)
def test_without_a_pipeline_there_are_no_boundaries(overrides: tuple[str, ...]) -> None:
    text = screen_of(recorded(make_plan(*overrides), busy(1)))
    assert "boundary  " not in text and "rank  stage" in text and "\n\n\n" not in text


# ---- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's, with a profile."""
    write(make_profile(tmp_path / "profile" / "steps_1-2"))
    return tmp_path


def test_show_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "show", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("steps 1 to 2 of tp=2 pp=2 dp=1")
    assert main(["profile", "show", str(folder / "profile" / "steps_1-2")]) == 0
    assert capsys.readouterr().out == text
    assert text.rstrip("\n") == screen_of(Analysis.read(folder).profile)


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "show", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    found = Analysis.read(folder)
    assert report == profile_report(found.profile, found.account, found.path, found.sentences)
    assert report["steps"] == [1, 2] and len(report["ranks"]) == 4 and len(report["boundaries"]) == 2
    for rank in report["ranks"]:
        assert rank["seconds"].keys() == {cause.value for cause in Cause}
        assert math.fsum(rank["seconds"].values()) == pytest.approx(rank["step_seconds"])
    path = report["critical_path"]
    assert path[0]["begin"] == 0 and all(one["end"] == other["begin"] for one, other in zip(path, path[1:]))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("[10]", "must be the first and the last of at most"),
        ("[1, 2, 3]", "must be the first and the last of at most"),
        ("[]", "must be the first and the last of at most"),
        ("[9, 3]", "must be the first and the last of at most"),
        ("[1, 5000]", "must be the first and the last of at most"),
        ("[0, 3]", "profile.steps"),
        ("[a, b]", "profile.steps"),
        ("7", "profile.steps"),
    ],
)
def test_steps_that_cannot_be_recorded(
    steps: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    assert main(["plan", str(tmp_path / "run.yaml"), f"profile.steps={steps}"]) == USER_ERROR_EXIT_CODE
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "profile.steps" in err and expected in err


def test_steps_and_a_switch_of_patterns() -> None:
    """A switch at step 4 lies between the updates 4 and 5."""

    def check(steps: str) -> None:
        check_config(parse_config(BASE, ["run.steps=9", "depth.switch_at={4: first:1}", f"profile.steps={steps}"]))

    for steps in ("[4, 5]", "[2, 6]", "[1, 5]"):
        with pytest.raises(
            ConfigError, match=r"profile.steps: .* holds the switch of patterns at step 4 .*; end before it"
        ):
            check(steps)
    for steps in ("[1, 4]", "[5, 9]", "[4, 4]", "[5, 5]"):
        check(steps)


def test_steps_behind_the_end_are_warned_of() -> None:
    config = check_config(parse_config(BASE, ["run.steps=9", "profile.steps=[5, 10]"]))
    assert [
        text for text in find_warnings(config) if text.startswith("profile.steps: [5, 10] ends after the last step")
    ]
    config = check_config(parse_config(BASE, ["run.steps=10", "profile.steps=[5, 10]"]))
    assert not [text for text in find_warnings(config) if "profile" in text]


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many", "1001"])
def test_a_number_of_steps_that_is_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["profile", "run.yaml", f"--steps={number}"])
    assert exit_.value.code == USER_ERROR_EXIT_CODE
    assert "is not a whole number from 1 to 1000" in capsys.readouterr().err
