"""A rank's pulse, its file, and the judgement of who fell silent first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lime_dist.layout import Layout
from lime_dist.lifecycle.heartbeat import Heartbeat, read_heartbeats, write_heartbeat, written_since
from lime_dist.lifecycle.pulse import Pass, Pulse
from lime_dist.lifecycle.silence import describe_silence, find_cause, find_died, first_silent

LAYOUT = Layout(pp=4, tp=2)
NOW, STALE_AFTER = 10_000.0, 300.0


def heartbeat(rank: int, **values: object) -> Heartbeat:
    """A rank that waits behind a backward pass and is alive."""
    beat = Heartbeat(
        global_rank=rank,
        coordinate=LAYOUT.coordinate(rank),
        host=f"n{rank // 2}",
        pid=100 + rank,
        job="12",
        step=41,
        phase="backward",
        at=Pass(rank // 2, 2),
        busy=False,
        done=900,
        moved=NOW - 600,
        alive=NOW - 1,
        ended=False,
    )
    return replace(beat, **values)


def all_waiting(**special: Heartbeat | None) -> list[Heartbeat | None]:
    """Eight ranks, of which `r3=...` is another."""
    return [special.get(f"r{rank}", heartbeat(rank)) for rank in range(8)]


def shown(pulse: Pulse) -> tuple[int, str, int | None, bool]:
    at = pulse.last.at
    return pulse.last.step, pulse.last.phase, at and at.microbatch, pulse.last.busy


def in_order(*passes: tuple[int, int], kinds: tuple[str, ...] = ("forward", "backward")) -> dict[str, list[Pass]]:
    """(chunk, microbatch) each, of every kind."""
    return {kind: [Pass(*each) for each in passes] for kind in kinds}


def test_a_pulse_tells_what_is_being_done_and_what_is_done() -> None:
    pulse = Pulse()
    assert shown(pulse) == (0, "start", None, True)
    seen = []
    forward = pulse.around("forward", lambda value: (seen.append(shown(pulse)), value)[1])
    backward = pulse.around("backward", lambda: seen.append(shown(pulse)))
    pulse.begin_step(41)
    assert shown(pulse) == (41, "data", None, True)
    pulse.finish()
    assert shown(pulse) == (41, "data", None, False)
    pulse.expect(in_order((1, 1), (1, 2)))
    assert (forward("a"), forward("b")) == ("a", "b")
    assert shown(pulse) == (41, "forward", 2, False)
    backward()
    assert seen == [(41, "forward", 1, True), (41, "forward", 2, True), (41, "backward", 1, True)]
    pulse.beat("update")
    assert shown(pulse) == (41, "update", None, True)
    pulse.begin_step(42)
    pulse.expect(in_order((1, 1), (1, 2)))
    forward("c")
    assert shown(pulse) == (42, "forward", 1, False), "each step has its own microbatches"


def test_a_pulse_tells_microbatches_and_not_passes() -> None:
    """A stage of three with two chunks: four microbatches are eight passes, and one is let through a chunk after the other."""
    pulse, seen = Pulse(), []
    order = ((0, 1), (0, 2), (0, 3), (3, 1), (3, 2), (3, 3), (0, 4), (3, 4))
    pulse.expect(in_order(*order, kinds=("forward",)))
    forward = pulse.around("forward", lambda: seen.append(pulse.last.at))
    for _ in order[:7]:
        forward()
    assert seen == [Pass(*each) for each in order[:7]]
    assert pulse.last.passes == {"forward": {0: 4, 3: 3}}


def test_a_pulse_counts_pieces_when_they_are_done() -> None:
    pulse = Pulse()
    pulse.expect(in_order((0, 1)))
    before = pulse.last.done
    assert pulse.around("forward", lambda *, since: pulse.last.done - since)(since=before) == 0
    assert pulse.last.done == before + 1


def test_work_that_fails_stays_begun() -> None:
    pulse = Pulse()
    pulse.expect(in_order((0, 1)))
    with pytest.raises(ZeroDivisionError):
        pulse.around("forward", lambda: 1 / 0)()
    assert shown(pulse) == (0, "forward", 1, True)


def test_a_touch_is_a_beat_of_the_same_piece() -> None:
    pulse = Pulse()
    pulse.beat("save")
    before = pulse.last
    pulse.touch()
    assert pulse.last is not before and pulse.last[:5] == before[:5] and pulse.last.time >= before.time


def test_heartbeats_read_back_by_rank(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeat"
    for rank in (0, 2, 3):
        write_heartbeat(folder, heartbeat(rank))
    later = heartbeat(2, step=42, passes={"forward": {1: 7, 5: 6}}, awaits="forward", awaited=Pass(5, 2))
    write_heartbeat(folder, later)
    (folder / "rank_00003.json").write_text('{"global_rank": 3, "coord')
    assert read_heartbeats(folder, 4) == [heartbeat(0), None, later, None]
    assert '"coordinate": {"pp": 1, "dp": 0, "tp": 0}' in (folder / "rank_00002.json").read_text()
    assert not list(folder.glob("*.tmp"))


def test_what_an_earlier_start_left_is_no_heartbeat_of_this_one() -> None:
    beats = [heartbeat(0, alive=NOW - 20), heartbeat(1, alive=NOW - 1), heartbeat(2, alive=NOW + 3), None]
    assert written_since(beats, NOW) == [None, beats[1], beats[2], None], "clocks of hosts differ by a second"


# ---- who was first; the skew of a second makes the others seem earlier

SKEWED = {"moved": NOW - 601.0, "alive": NOW - 2.0}
CASES = [
    ("a host that is gone, though it had done more", heartbeat(3, alive=NOW - 590, moved=NOW - 590, done=950)),
    ("a rank that never wrote", None),
    ("a rank that left", heartbeat(3, ended=True, done=950)),
    ("fewer pieces done", heartbeat(3, done=899, moved=NOW - 599.5)),
    ("inside of a piece while the others wait", heartbeat(3, busy=True, moved=NOW - 599.5, phase="forward")),
    ("the earliest, all else equal", heartbeat(3, moved=NOW - 603)),
]


@pytest.mark.parametrize(("why", "beat"), CASES)
def test_first_silent(why: str, beat: Heartbeat | None) -> None:
    others = {f"r{rank}": heartbeat(rank, **SKEWED) for rank in (1, 5)}
    assert first_silent(all_waiting(r3=beat, **others), NOW, STALE_AFTER) == 3


def test_of_two_that_write_no_more_the_one_that_did_less_was_first() -> None:
    gone = {"r2": heartbeat(2, alive=NOW - 500, done=890), "r6": heartbeat(6, alive=NOW - 590)}
    assert first_silent(all_waiting(**gone), NOW, STALE_AFTER) == 2


def test_a_heartbeat_a_little_late_is_no_dead_host() -> None:
    """The others have fired and gone a few seconds ago, or a network disk shows their files late."""
    late = {f"r{rank}": heartbeat(rank, alive=NOW - 40) for rank in (0, 7)}
    assert first_silent(all_waiting(r3=heartbeat(3, busy=True), **late), NOW, STALE_AFTER) == 3


TOLD = [
    (
        heartbeat(3, alive=NOW - 598, phase="forward"),
        "rank 3 (pp=1 dp=0 tp=1) on n1, stage 1, since step 41 forward microbatch 2; "
        "no sign of life for 598 s: stopped, or its host is gone",
    ),
    (heartbeat(3, busy=True), "rank 3 (pp=1 dp=0 tp=1) on n1, stage 1, since step 41 backward microbatch 2; alive, and inside of it"),
    (
        heartbeat(3, phase="save", at=None),
        "rank 3 (pp=1 dp=0 tp=1) on n1, stage 1, since step 41 save; alive, and waits behind it",
    ),
    (heartbeat(3, ended=True), "rank 3 (pp=1 dp=0 tp=1) on n1, stage 1, since step 41 backward microbatch 2; it has left"),
    (
        heartbeat(3, at=Pass(5, 2), passes={"backward": {1: 8, 5: 9}}),
        "rank 3 (pp=1 dp=0 tp=1) on n1, stage 1, since step 41 backward microbatch 2 in chunk 5; alive, and waits behind it",
    ),
    (None, "rank 3 (pp=1 dp=0 tp=1), stage 1, which never began"),
]  # fmt: skip


@pytest.mark.parametrize(("beat", "text"), TOLD)
def test_what_is_told_of_a_silent_rank(beat: Heartbeat | None, text: str) -> None:
    assert describe_silence(LAYOUT, all_waiting(r3=beat), 3, NOW, STALE_AFTER) == text


# ---- what lies between ranks that are all alive


def passes(forward: int, backward: int, **more: object) -> dict[str, object]:
    """A rank that awaits a pass unless `more` says otherwise; counts are of passes since the start."""
    return {"counts": {"forward": forward, "backward": backward}, "done": 900 + forward + backward, **more}


def awaiting(kind: str, microbatch: int) -> dict[str, object]:
    return {"awaits": kind, "awaited": microbatch}


def stages(*values: dict[str, object]) -> list[Heartbeat | None]:
    """One dict a stage of four, each with one chunk; both of its tensor ranks are alike."""
    return [heartbeat(rank, **of_chunk(rank // 2, **values[rank // 2])) for rank in range(8)]


def of_chunk(chunk: int, counts: dict[str, int], **more: object) -> dict[str, object]:
    passes = {kind: {chunk: count} for kind, count in counts.items()}
    return more | {"passes": passes, "awaited": Pass(chunk, more["awaited"]) if "awaited" in more else None}


def cause(heartbeats: list[Heartbeat | None], layout: Layout = LAYOUT) -> str:
    return find_cause(layout, heartbeats, NOW, STALE_AFTER).text


def test_a_forward_that_was_sent_and_has_not_come_names_the_boundary() -> None:
    """1F1B of four stages: stage 2 has not got the third forward, so no backward comes either, and all ranks wait."""
    beats = stages(
        passes(104, 100, **awaiting("backward", 1)),
        passes(103, 100, **awaiting("backward", 1)),
        passes(102, 100, **awaiting("forward", 3)),
        passes(102, 102, **awaiting("forward", 3)),
    )
    assert cause(beats) == (
        "silent: between stage 1 on n1 and stage 2 on n2 (forward of microbatch 3, step 41, ranks 2 and 4); "
        "sent, and it has not come"
    )


def test_a_backward_that_was_sent_and_has_not_come_names_the_boundary() -> None:
    """The stage before has done more forwards than the one behind, as it always has, and that is no sign."""
    beats = stages(
        passes(104, 100, **awaiting("backward", 1)),
        passes(103, 100, **awaiting("backward", 1)),
        passes(102, 100, **awaiting("backward", 1)),
        passes(102, 102, **awaiting("forward", 3)),
    )
    assert cause(beats).startswith(
        "silent: between stage 2 on n2 and stage 3 on n3 (backward of microbatch 1, step 41, ranks 4 and 6)"
    )


def test_a_stage_that_computes_is_named_and_no_boundary() -> None:
    beats = stages(
        passes(104, 100, **awaiting("backward", 1)),
        passes(102, 100, busy=True, phase="forward", at=Pass(1, 3), done=1001),
        passes(102, 100, **awaiting("forward", 3)),
        passes(102, 102, **awaiting("forward", 3)),
    )
    beats[3] = heartbeat(3, **of_chunk(1, **passes(103, 100, **awaiting("backward", 1))))
    beats[5] = heartbeat(5, **of_chunk(2, **passes(102, 100)))  # has its part, and waits for that of its neighbour
    assert cause(beats) == (
        "first silent: rank 2 (pp=1 dp=0 tp=0) on n1, stage 1, since step 41 forward microbatch 3; alive, and inside of it"
    )


def test_a_host_that_is_gone_is_named_though_a_bundle_was_sent_to_it() -> None:
    beats = stages(
        passes(104, 100, **awaiting("backward", 1)),
        passes(103, 100, **awaiting("backward", 1)),
        passes(102, 100, **awaiting("forward", 3), alive=NOW - 590),
        passes(102, 102, **awaiting("forward", 3)),
    )
    assert cause(beats).startswith("first silent: rank 4 (pp=2 dp=0 tp=0) on n2, stage 2")
    beats[4] = None
    assert cause(beats) == "first silent: rank 4 (pp=2 dp=0 tp=0), stage 2, which never began"


def test_tensor_ranks_that_wait_for_each_other_are_named_together() -> None:
    inside = {"busy": True, "phase": "forward", "at": Pass(1, 3)}
    beats = all_waiting(r2=heartbeat(2, done=890, **inside), r3=heartbeat(3, done=890, moved=NOW - 610, **inside))
    assert cause(beats) == (
        "silent: among the tensor ranks of stage 1 (2, 3) on n1, since step 41 forward microbatch 3; "
        "all alive and inside of it: one of them hangs there, or a link between them is down"
    )


def test_no_clock_picks_one_of_ranks_that_are_level() -> None:
    assert cause(all_waiting(r3=heartbeat(3, moved=NOW - 650))) == (
        "silent: all ranks on n0, n1, n2, n3, since step 41 backward microbatch 2; "
        "all alive and behind it: one of them hangs there, or a link between them is down"
    )
    replicas = Layout(pp=2, dp=2, tp=2)
    beats = [replace(beat, coordinate=replicas.coordinate(beat.global_rank)) for beat in all_waiting() if beat]
    behind = [replace(beat, done=899) if beat.coordinate.pp_rank == 1 else beat for beat in beats]
    assert cause(behind, replicas).startswith("silent: among the ranks of stage 1 (4, 5, 6, 7) on n2, n3, since")
    mixed = [replace(beat, done=899) if beat.global_rank in (1, 6) else beat for beat in beats]
    assert cause(mixed, replicas).startswith("silent: among ranks 1, 6 on n0, n3, since")


def test_who_has_left_behind_the_last_step_holds_up_nobody() -> None:
    """The others have gone, one has not."""
    left = [heartbeat(rank, phase="leave", at=None, ended=rank != 5) for rank in range(8)]
    assert cause(left).startswith("first silent: rank 5 (pp=2 dp=0 tp=1) on n2, stage 2, since step 41 leave; alive")


def test_a_rank_that_writes_no_more_has_died_and_one_that_left_has_not() -> None:
    before = all_waiting(r1=None, r2=heartbeat(2, alive=NOW + 90))
    later: list[Heartbeat | None] = [beat and replace(beat, alive=beat.alive + 3) for beat in before]
    assert find_died(before, later) is None
    left = [beat and replace(beat, ended=beat.global_rank == 2) for beat in before]
    assert find_died(before, [later[0], later[1], left[2], before[3], *later[4:]]) == before[3]


def test_a_pulse_tells_what_its_rank_awaits_and_how_many_passes_are_done() -> None:
    pulse, seen = Pulse(), []

    def look() -> None:
        seen.append((pulse.last.awaits, pulse.last.awaited, pulse.last.busy))

    pulse.begin_step(1)
    pulse.expect(in_order((0, 1), (0, 2)))
    forward = pulse.around("forward", lambda: None)
    forward()
    pulse.awaiting("forward", Pass(0, 2), look)
    assert seen == [("forward", Pass(0, 2), False)] and pulse.last.awaits is None
    pulse.around("forward", lambda: pulse.awaiting("forward", Pass(0, 2), look))()
    pulse.awaiting("forward", Pass(0, 2), look)
    assert seen[1:] == [("forward", Pass(0, 2), True), ("forward", Pass(0, 2), False)], "within the pass, and behind it"
    pulse.begin_step(2)
    pulse.expect(in_order((0, 1), (0, 2)))
    forward()
    assert pulse.last.passes == {"forward": {0: 3}, "backward": {0: 0}}


# ---- virtual stages: of three stages, 0 has chunks 0 and 3, 1 has 1 and 4, 2 has 2 and 5


def in_chunks(kind: str, *counts: tuple[int, int], **awaited: Pass) -> list[Heartbeat | None]:
    """counts: of passes of `kind`, by stage, of its first and its second chunk. awaited: by `s` and the stage."""
    layout = Layout(pp=3)
    return [
        heartbeat(
            stage, coordinate=layout.coordinate(stage), host=f"n{stage}", passes={kind: {stage: first, 3 + stage: second}},
            awaits=kind if f"s{stage}" in awaited else None, awaited=awaited.get(f"s{stage}"), done=900 + first + second,
        )
        for stage, (first, second) in enumerate(counts)
    ]  # fmt: skip


def test_a_forward_that_has_not_come_round_from_the_last_stage_names_both() -> None:
    """Stage 0 has done more forwards than stage 2, and awaits one that stage 2 has sent."""
    beats = in_chunks("forward", (6, 2), (6, 2), (5, 2), s0=Pass(3, 3), s1=Pass(4, 3), s2=Pass(5, 3))
    assert cause(beats, Layout(pp=3)) == (
        "silent: between stage 0 on n0 and stage 2 on n2 (forward of microbatch 3 in chunk 3, step 41, ranks 0 and 2); "
        "sent, and it has not come"
    )


def test_a_backward_that_has_not_come_round_from_the_first_stage_names_both() -> None:
    beats = in_chunks("backward", (3, 4), (3, 4), (3, 4), s0=Pass(0, 4), s1=Pass(1, 4), s2=Pass(2, 4))
    assert cause(beats, Layout(pp=3)) == (
        "silent: between stage 0 on n0 and stage 2 on n2 (backward of microbatch 4 in chunk 2, step 41, ranks 0 and 2); "
        "sent, and it has not come"
    )


def test_more_passes_in_other_chunks_are_no_sign() -> None:
    """Stage 1 has done more forwards than stage 2, but not the one that stage 2 awaits: all wait for stage 1, inside of it."""
    beats = in_chunks("forward", (6, 3), (4, 2), (3, 2), s0=Pass(3, 4), s2=Pass(5, 3))
    assert beats[1] is not None
    beats[1] = replace(beats[1], phase="forward", at=Pass(4, 3), busy=True)
    assert cause(beats, Layout(pp=3)) == (
        "first silent: rank 1 (pp=1 dp=0 tp=0) on n1, stage 1, since step 41 forward microbatch 3 in chunk 4; "
        "alive, and inside of it"
    )
