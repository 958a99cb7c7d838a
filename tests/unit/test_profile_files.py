"""A profile's folder: read as it was written; and whatever is wrong with it, one line says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy
import pytest
from recorded import RankClock, Times, make_plan, recorded, write
from safetensors import safe_open
from safetensors.numpy import save_file

from lime_dist.cli.command_line import main
from lime_dist.config.paths import with_absolute_paths
from lime_dist.errors import USER_ERROR_EXIT_CODE
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.profile_files import (
    VERSION,
    MeasuredLink,
    Profile,
    ProfileError,
    RankRecord,
    clear,
    find_profile,
    profile_folder,
    read_profile,
)

OVERRIDES = ("parallel.pp=2", "parallel.tp=2")
LINKS = (MeasuredLink(from_stage=0, to_stage=1, bytes_per_second=1.5e9),)


def make_profile(folder: Path, *overrides: str) -> Profile:
    """Of two steps."""
    clocks = {1: RankClock(ahead=10**12, drift=1e-5, error=777)}
    plan = make_plan(*(overrides or OVERRIDES))
    profile = recorded(plan, Times(), Times(host=lambda: 5), clocks=clocks, links=LINKS, folder=folder)
    return replace(profile, ranks=tuple(map(with_busy, profile.ranks)))


def with_busy(record: RankRecord) -> RankRecord:
    steps = tuple(
        replace(
            step, busy=[mark // 2 for mark in step.marks], delayed=[mark // 3 for mark in step.marks], process_busy=99
        )
        for step in record.steps
    )
    return replace(record, steps=steps)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole profile of 4 ranks."""
    write(make_profile(tmp_path / "profile" / "steps_1-2"))
    return tmp_path / "profile" / "steps_1-2"


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `profile show` says of it, in one line."""
    assert main(["profile", "show", str(folder)]) == USER_ERROR_EXIT_CODE
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lime-dist: ") and err.count("\n") == 1
    with pytest.raises(ProfileError):
        read_profile(folder)
    return err


# ---- round trip


@pytest.mark.parametrize("overrides", [(), ("parallel.pp=1",), ("parallel.pp=3", "parallel.dp=2")], ids=str)
def test_read_as_written(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """With collectives, or without any; on a GPU ranks have no core's time."""
    written = make_profile(tmp_path, *overrides)
    on_gpu = replace(
        written.ranks[0], steps=tuple(replace(step, busy=None) for step in written.ranks[0].steps), cores=None
    )
    written = replace(written, ranks=(on_gpu, *written.ranks[1:]))
    write(written)
    found = read_profile(tmp_path)
    assert found.plan == written.plan and found.plan.config == with_absolute_paths(written.plan.config)
    used = {
        record.rank: {each.group_name for step in record.steps for each in step.collectives} for record in written.ranks
    }
    for actual, expected in zip(found.ranks, written.ranks, strict=True):
        assert set(used[expected.rank]) == set(expected.group_ranks)
        assert actual == expected
    assert (found.steps, found.links, found.folder) == (written.steps, LINKS, tmp_path)


def test_the_newest_profile_of_a_run_is_taken(tmp_path: Path) -> None:
    for first, age in ((1, 100), (10, 50)):
        folder = profile_folder(tmp_path, first, first + 1)
        write(make_profile(folder))
        os.utime(folder / "profile.json", (1e9 - age, 1e9 - age))
    assert find_profile(tmp_path) == tmp_path / "profile" / "steps_10-11"
    assert find_profile(tmp_path / "profile" / "steps_1-2") == tmp_path / "profile" / "steps_1-2"
    # One without its head is not whole: the last file that is written.
    (tmp_path / "profile" / "steps_10-11" / "profile.json").unlink()
    assert find_profile(tmp_path) == tmp_path / "profile" / "steps_1-2"


def test_a_folder_that_is_written_anew_is_no_profile_until_it_is_whole(folder: Path) -> None:
    """Ranks of one recording and of another must not be read as one."""
    clear(folder)
    with pytest.raises(ProfileError, match="no profile there"):
        read_profile(folder)
    clear(folder.parent / "steps_7-8")
    assert (folder.parent / "steps_7-8").is_dir()


def test_writing_leaves_no_other_files(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {"profile.json", "config.yaml", *(f"rank_{rank}.safetensors" for rank in range(4))}


@pytest.mark.parametrize("target", ["", "missing", "file"])
def test_no_profile(tmp_path: Path, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "no profile there; make one with `lime-dist profile CONFIG`" in refusal(tmp_path / target, capsys)


# ---- clocks


def test_offsets_are_interpolated_for_drift() -> None:
    """A clock that is 1 s ahead, and 2 ms more 100 s later."""
    offsets = ClockOffset(5_000_000_000, 1_000_000_000, 10), ClockOffset(105_000_000_000, 1_002_000_000, 30)
    record = replace(recorded(make_plan()).ranks[0], offsets=offsets)
    assert record.on_first_clock(5_000_000_000) == 4_000_000_000
    assert record.on_first_clock(105_000_000_000) == 103_998_000_000
    assert record.on_first_clock(55_000_000_000) == 55_000_000_000 - 1_001_000_000
    at_once = replace(record, offsets=(offsets[0], offsets[0]))
    assert at_once.on_first_clock(7_000_000_000) == 6_000_000_000


def test_clock_error_and_drift_are_of_the_worst_rank() -> None:
    clocks = {0: RankClock(), 1: RankClock(error=5_000, drift=-3e-5), 2: RankClock(error=2_000, drift=1e-5)}
    profile = recorded(make_plan("parallel.pp=3"), Times(), clocks=clocks)
    assert profile.clock_error_seconds == pytest.approx(5e-6)
    assert profile.largest_drift == pytest.approx(3e-5, rel=1e-3)


# ---- damaged


@pytest.mark.parametrize("name", ["profile.json", "config.yaml", "rank_0.safetensors", "rank_3.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
def test_a_file_cut_short(folder: Path, name: str, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    assert "record it again" in refusal(folder, capsys)


@pytest.mark.parametrize("name", ["config.yaml", "rank_0.safetensors", "rank_3.safetensors"])
def test_a_file_that_is_missing(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).unlink()
    assert "record it again" in refusal(folder, capsys)


@pytest.mark.parametrize("name", ["profile.json", "config.yaml", "rank_0.safetensors", "rank_3.safetensors"])
def test_random_bytes(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / name).write_bytes(Random(name).randbytes(4000))
    assert "record it again" in refusal(folder, capsys)


def test_another_version(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_head(folder, version=VERSION + 1)
    assert "written by another version of lime-dist" in refusal(folder, capsys)


def test_another_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config was edited: the ranks recorded other operations."""
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("num_microbatches: 4", "num_microbatches: 2"))
    assert "recorded another plan" in refusal(folder, capsys)


def test_ranks_that_have_changed_places(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rank_1.safetensors").write_bytes((folder / "rank_0.safetensors").read_bytes())
    assert "record it again" in refusal(folder, capsys)


def edit_head(folder: Path, **values: object) -> None:
    head = json.loads((folder / "profile.json").read_text())
    (folder / "profile.json").write_text(json.dumps(head | values))


LINK = {"from_stage": 0, "to_stage": 1, "bytes_per_second": 1.0}
HEADS: dict[str, Callable[[Path], object]] = {
    "a list": lambda folder: (folder / "profile.json").write_text("[1, 2]"),
    "deep": lambda folder: (folder / "profile.json").write_text("[" * 100_000),
    "NaN": lambda folder: (folder / "profile.json").write_text("NaN"),
    "no steps": lambda folder: edit_head(folder, steps=[]),
    "three steps": lambda folder: edit_head(folder, steps=[1, 2, 3]),
    "steps as text": lambda folder: edit_head(folder, steps="ab"),
    "a huge step": lambda folder: edit_head(folder, steps=[1, 1e400]),
    "steps as a number": lambda folder: edit_head(folder, steps=7),
    "links as a number": lambda folder: edit_head(folder, links=7),
    "a link of text": lambda folder: edit_head(folder, links=[LINK | {"bytes_per_second": "fast"}]),
    "a link of other keys": lambda folder: edit_head(folder, links=[{"speed": 1}]),
}


@pytest.mark.parametrize("damage", HEADS)
def test_a_head_that_is_garbage(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    HEADS[damage](folder)
    assert "record it again" in refusal(folder, capsys)


def edit_rank(folder: Path, about: Callable[[dict], object] | None = None, **arrays: object) -> None:
    """Of rank 2. about: changes the metadata, or gives what is to stand in their place."""
    path = folder / "rank_2.safetensors"
    with safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["rank"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict
    replaced = about(metadata) if about is not None else None
    for name, change in arrays.items():
        found[name] = numpy.ascontiguousarray(change(found[name]))  # type: ignore[operator]
    text = json.dumps(metadata if replaced is None else replaced)
    save_file(found, path, {"rank": text})


RANKS: dict[str, Callable[[Path], None]] = {
    "metadata: a list": lambda folder: edit_rank(folder, lambda about: [1]),
    "metadata: a text": lambda folder: edit_rank(folder, lambda about: "groups"),
    "metadata: a number": lambda folder: edit_rank(folder, lambda about: 7),
    "metadata: no groups": lambda folder: edit_rank(folder, lambda about: about.pop("groups") and None),
    "metadata: no host": lambda folder: edit_rank(folder, lambda about: about.pop("host") and None),
    "metadata: no threads": lambda folder: edit_rank(folder, lambda about: about.update(threads=0)),
    "metadata: a clock that ran backwards": lambda folder: edit_rank(
        folder, lambda about: about.update(offsets=[[0, 0, 0], [10, 20, 0]])
    ),
    "metadata: a huge offset": lambda folder: edit_rank(folder, lambda about: about.update(offsets=[[0, 10**400, 0]] * 2)),
    "metadata: another rank": lambda folder: edit_rank(folder, lambda about: about.update(rank=77)),
    "metadata: offsets of text": lambda folder: edit_rank(folder, lambda about: about.update(offsets=["abc", "abc"])),
    "metadata: one offset": lambda folder: edit_rank(folder, lambda about: about.update(offsets=[[0, 0, 0]])),
    "metadata: groups of numbers": lambda folder: edit_rank(folder, lambda about: about.update(groups=[1, 2])),
    "metadata: a group of strangers": lambda folder: edit_rank(
        folder, lambda about: about.update(groups=[[name, [0, 99]] for name, _ in about["groups"]])
    ),
    "metadata: groups of text": lambda folder: edit_rank(
        folder, lambda about: about.update(groups=[[name, ["a"]] for name, _ in about["groups"]])
    ),
    "metadata: threads of text": lambda folder: edit_rank(folder, lambda about: about.update(threads="many")),
    "metadata: cores of text": lambda folder: edit_rank(folder, lambda about: about.update(cores="many")),
    "metadata: a host that is none": lambda folder: edit_rank(folder, lambda about: about.update(host=[1])),
    "no step": lambda folder: edit_rank(
        folder,
        **{name: lambda old: old[:0] for name in ("marks", "busy", "process_busy", "arrivals", "sent_bytes", "collectives")},
    ),
    "a step less": lambda folder: edit_rank(folder, marks=lambda old: old[:1]),
    "fewer arrivals": lambda folder: edit_rank(folder, arrivals=lambda old: old[:, :-1]),
    "arrivals of a step less": lambda folder: edit_rank(folder, arrivals=lambda old: old[:1]),
    "fewer busy": lambda folder: edit_rank(folder, busy=lambda old: old[:, :-2]),
    "marks in one row": lambda folder: edit_rank(folder, marks=lambda old: old.reshape(-1)),
    "marks that fall": lambda folder: edit_rank(folder, marks=lambda old: old[:, ::-1]),
    "marks with parts": lambda folder: edit_rank(folder, marks=lambda old: old + 0.5),
    "marks that are no numbers": lambda folder: edit_rank(folder, marks=lambda old: old * float("nan")),
    "sent bytes of one way": lambda folder: edit_rank(folder, sent_bytes=lambda old: old[:, :1]),
    "process_busy of one step": lambda folder: edit_rank(folder, process_busy=lambda old: old[:1]),
    "a collective of no step": lambda folder: edit_rank(folder, collectives=lambda old: old + [100, 0, 0, 0, 0]),
    "a collective of step -1": lambda folder: edit_rank(folder, collectives=lambda old: old - [1, 0, 0, 0, 0]),
    "a collective of no group": lambda folder: edit_rank(folder, collectives=lambda old: old + [0, 100, 0, 0, 0]),
    "a collective of group -1": lambda folder: edit_rank(folder, collectives=lambda old: old - [0, 1, 0, 0, 0]),
    "collectives of four columns": lambda folder: edit_rank(folder, collectives=lambda old: old[:, :4]),
    "collectives of six columns": lambda folder: edit_rank(folder, collectives=lambda old: numpy.hstack((old, old[:, :1]))),
}  # fmt: skip


@pytest.mark.parametrize("damage", RANKS)
def test_a_rank_that_is_garbage(folder: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    RANKS[damage](folder)
    assert "record it again" in refusal(folder, capsys)


def test_counts_that_are_huge_are_not_believed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The header says how much follows."""
    path = folder / "rank_2.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    begin = header["marks"]["data_offsets"][0]
    header["marks"] |= {"shape": [2, 10**12], "data_offsets": [begin, begin + 16 * 10**12]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
    assert "record it again" in refusal(folder, capsys)
    path.write_bytes((2**62).to_bytes(8, "little") + whole[8:])
    assert "record it again" in refusal(folder, capsys)


def test_any_byte_may_be_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A profile, or one line: never a traceback."""
    random = Random(4)
    for _ in range(40):
        path = random.choice(sorted(folder.iterdir()))
        whole = path.read_bytes()
        changed = bytearray(whole)
        for _ in range(random.choice([1, 1, 5])):
            # The head of each file is where structure is.
            changed[random.randrange(min(len(changed), random.choice([300, 3000, 10**9])))] = random.randrange(256)
        path.write_bytes(changed)
        code = main(["profile", "show", str(folder)])
        err = capsys.readouterr().err
        assert (code, err.count("\n")) in ((0, 0), (USER_ERROR_EXIT_CODE, 1)), err
        path.write_bytes(whole)
