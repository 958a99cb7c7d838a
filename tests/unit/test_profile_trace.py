"""A profile as a trace: by the Trace Event Format, with the timeline's times, and as Perfetto and HolisticTraceAnalysis read it."""

from __future__ import annotations

import gzip
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import disagreeing_clock, operations_of, written
from trace_processor import ask, what_is_missing

from lime_dist.config import check_config, parse_config
from lime_dist.errors import ConfigError
from lime_dist.plan.operations import Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.profiling.accounting import account
from lime_dist.profiling.kernel_trace import KernelTrace
from lime_dist.profiling.profile_files import Profile, ProfileError, kernels_file
from lime_dist.profiling.timeline import Cause, StepTimeline, read_timelines
from lime_dist.profiling.trace import write_trace
from lime_dist.profiling.trace_events import first_pid

Event = dict[str, Any]
NS = 0.0011  # us by which sums of times that are whole ns may be off
LAYOUTS = ("pp=3", "pp=2 tp=2", "pp=2 dp=2", "pp=2 virtual_stages=2", "pp=1")


def make_plan(layout: str) -> RunPlan:
    keys = [f"parallel.{word}" for word in layout.split()]
    values = {
        "model": {"num_layers": 8, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
        "data": {"seq_length": 6, "global_batch_size": 12},
        "pipeline": {"num_microbatches": 4 if "virtual" in layout else 3, "min_message": 0},
        "run": {"device": "cpu"},
    }
    config = parse_config(values, keys)
    return plan_run(check_config(config, config.layout.world_size))


class Recorded:
    """A made profile, and its trace."""

    def __init__(self, folder: Path, layout: str):
        self.profile = written(folder / "profile", make_plan(layout))
        self.timelines = list(read_timelines(self.profile))
        (self.path,) = write_trace(self.profile, self.timelines, str(folder / "trace.json"))
        self.trace = json.loads(self.path.read_text())
        self.events: list[Event] = self.trace["traceEvents"]
        threads = named(self.events, "thread_name")
        processes = {pid: int(name.split()[3]) for (pid, _), name in named(self.events, "process_name").items()}
        self.spans: dict[tuple[int, str], list[Event]] = defaultdict(list)  # by rank and thread
        for event in self.events:
            if event["ph"] == "X":
                key = event["pid"], event["tid"]
                self.spans[processes[event["pid"]], threads[key]].append(event)


@pytest.fixture(scope="module", params=LAYOUTS)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("profile"), request.param)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, list[StepTimeline]]:
    profile = written(tmp_path_factory.mktemp("profile"), make_plan("pp=3"))
    return profile, list(read_timelines(profile))


@pytest.fixture
def fresh(tmp_path: Path) -> tuple[Profile, list[StepTimeline]]:
    profile = written(tmp_path / "profile", make_plan("pp=3"))
    return profile, list(read_timelines(profile))


def named(events: list[Event], kind: str) -> dict[tuple[int, int], str]:
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == kind}


def end_of(event: Event) -> float:
    return event["ts"] + event["dur"]


def check_format(events: list[Event]) -> None:
    """Of the Trace Event Format: complete events, flows and metadata; spans of a thread follow or enclose each other."""
    assert {event["ph"] for event in events} <= {"X", "s", "f", "M"}
    threads, processes = named(events, "thread_name"), named(events, "process_name")
    of_thread: dict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] != "M":
            assert event["pid"] > 0 and isinstance(event["tid"], int) and event["name"] and event["cat"]
            of_thread[event["pid"], event["tid"]].append(event)
    assert of_thread.keys() <= threads.keys() and {(pid, 0) for pid, _ in of_thread} <= processes.keys()
    for own in of_thread.values():
        assert all(one["ts"] <= other["ts"] for one, other in pairwise(own))
        open_until: list[float] = []
        for event in own:
            if event["ph"] == "X":
                assert event["dur"] >= 0
                while open_until and open_until[-1] <= event["ts"] + NS:
                    open_until.pop()
                assert not open_until or end_of(event) <= open_until[-1] + NS
                open_until.append(end_of(event))


# ---- the Trace Event Format


def test_events_are_those_of_the_format(recorded: Recorded) -> None:
    assert recorded.trace["displayTimeUnit"] == "ms"
    check_format(recorded.events)
    assert all(event["ts"] >= 0 for event in recorded.events if event["ph"] != "M")


def test_processes_are_sorted_by_stage_and_then_by_rank(recorded: Recorded) -> None:
    order = {
        event["pid"]: event["args"]["sort_index"] for event in recorded.events if event["name"] == "process_sort_index"
    }
    names = named(recorded.events, "process_name")
    shown = [names[pid, 0] for pid in sorted(order, key=order.__getitem__)]
    layout = recorded.profile.plan.layout
    places = [(layout.coordinate(rank).pp_rank, rank) for rank in range(layout.world_size)]
    assert shown == [f"stage {stage} rank {rank} host{rank}" for stage, rank in sorted(places)]


def test_an_arrow_goes_from_each_send_to_where_it_was_waited_for(recorded: Recorded) -> None:
    ends: dict[int, dict[str, Event]] = defaultdict(dict)
    for event in recorded.events:
        if event["ph"] in "sf":
            assert event["ph"] not in ends[event["id"]]
            ends[event["id"]][event["ph"]] = event
    assert len(ends) == sum(len(timeline.deliveries) for timeline in recorded.timelines)
    for pair in ends.values():
        assert set(pair) == {"s", "f"} and pair["s"]["ts"] <= pair["f"]["ts"]
        start, end = bound(recorded.events, pair["s"]), bound(recorded.events, pair["f"])
        assert start["name"].startswith("send ")
        assert end["ts"] >= start["ts"], "Perfetto would turn it round"
        assert end["name"] == start["name"].replace("send", "await")


def bound(events: list[Event], flow: Event) -> Event:
    """The span that a flow's event belongs to: the last begun before it, in the order of the file, that is not over."""
    begun = takewhile(lambda event: event is not flow, events)
    *_, last = (
        event
        for event in begun
        if event["ph"] == "X" and (event["pid"], event["tid"]) == (flow["pid"], flow["tid"])
        if flow["ts"] < end_of(event) - NS
    )
    return last


# ---- times


def test_operations_are_the_timelines_pieces(recorded: Recorded) -> None:
    for rank in range(len(recorded.profile.ranks)):
        spans = recorded.spans[rank, "operations"]
        pieces = [piece for timeline in recorded.timelines for piece in timeline.pieces[rank]]
        assert [event["cat"] for event in spans] == [piece.cause.value for piece in pieces]
        assert [event["dur"] for event in spans] == pytest.approx([piece.seconds * 1e6 for piece in pieces], abs=2 * NS)
        first = recorded.timelines[0].pieces[rank]
        assert [event["ts"] for event in spans[: len(first)]] == pytest.approx(
            [piece.begin * 1e6 for piece in first], abs=NS
        )


def test_causes_sum_to_the_account(recorded: Recorded) -> None:
    for of_rank in account(recorded.profile, recorded.timelines).ranks:
        sums: Counter[str] = Counter()
        for event in recorded.spans[of_rank.rank, "operations"]:
            sums[event["cat"]] += event["dur"]
        for cause, seconds in of_rank.seconds.items():
            assert sums[cause.value] / len(recorded.timelines) == pytest.approx(seconds * 1e6, abs=1)


def test_every_pass_is_there_with_its_layers(recorded: Recorded) -> None:
    plan = recorded.profile.plan
    for rank in range(len(recorded.profile.ranks)):
        passes = {
            (event["name"], event["args"]["chunk"])
            for event in recorded.spans[rank, "operations"]
            if event["cat"] == "compute"
        }
        operations = [each.action for each in operations_of(plan, rank) if each.verb is Verb.RUN]
        assert passes == {(f"{each.kind.name.lower()} {each.microbatch_index}", each.chunk) for each in operations}
    if plan.layout.pp == 3:
        (forward, *_) = [event for event in recorded.spans[0, "operations"] if event["name"] == "forward 0"]
        layers = plan.stages[0].chunks[0].layers
        assert forward["args"]["layers"] == f"{layers[0]}-{layers[-1]}"


def test_steps_are_what_profilers_call_them(recorded: Recorded) -> None:
    for rank in range(len(recorded.profile.ranks)):
        steps, operations = recorded.spans[rank, "steps"], recorded.spans[rank, "operations"]
        assert [event["name"] for event in steps] == ["ProfilerStep#3", "ProfilerStep#4"]
        assert all(event["cat"] == "user_annotation" for event in steps)
        assert steps[0]["ts"] == operations[0]["ts"]
        assert end_of(steps[-1]) == pytest.approx(end_of(operations[-1]), abs=NS)


def test_links_carry_what_the_plan_sends(recorded: Recorded) -> None:
    plan, num_steps = recorded.profile.plan, len(recorded.timelines)
    for rank in range(len(recorded.profile.ranks)):
        for way in ("forward", "backward"):
            sent = [
                operation.message.num_bytes
                for operation in operations_of(plan, rank)
                if operation.verb is Verb.SEND and operation.action.kind.name.lower() == way and operation.message
            ]
            messages = recorded.spans[rank, f"link out {way}"]
            assert sorted(event["args"]["bytes"] for event in messages) == sorted(sent * num_steps)
            for event in messages:
                assert event["args"]["from_rank"] == rank
                assert 0 <= event["args"]["transfer_ms"] <= event["dur"] / 1000 + NS
                assert event["args"]["queue_ms"] >= 0


def test_collectives_are_shown_while_they_were_waited_for(recorded: Recorded) -> None:
    waits = [piece for timeline in recorded.timelines for piece in timeline.pieces[0] if piece.collective is not None]
    shown = recorded.spans[0, "collectives"]
    assert sum(event["dur"] for event in shown) == pytest.approx(sum(piece.seconds for piece in waits) * 1e6, abs=1)
    plan, of_tensor = recorded.profile.plan, [event for event in shown if event["cat"] == Cause.TENSOR.value]
    runs = sum(operation.verb is Verb.RUN for operation in operations_of(plan, 0)) * len(recorded.timelines)
    assert len(of_tensor) == (runs if plan.layout.tp > 1 else 0)
    assert len(shown) == sum(len(step.collectives) for step in recorded.profile.ranks[0].steps)


# ---- torch.profiler's


def kineto(profile: Profile, rank: int, moment: float, seconds: float, **args: Any) -> Event:
    """As torch.profiler writes it on `rank`: an operator that began at `moment` of rank 0's clock, in ns, and one before all."""
    base = 1_690_000_000_000_000_000
    record = profile.ranks[rank]

    def us(at: float) -> float:
        return (disagreeing_clock(rank).at(round(at)) + record.epoch_ns - base) / 1000

    process = {"pid": 4321, "tid": 4321}
    early = {"ph": "X", "cat": "cpu_op", "name": "aten::zeros", **process, "ts": us(-(10**6)), "dur": 1.0}
    label = {"ph": "M", "name": "process_labels", "ts": 0, "pid": 4321, "tid": 0, "args": {"labels": "CPU"}}
    thread = {"ph": "M", "name": "thread_name", "ts": 0, **process, "args": {"name": "thread 4321 (python)"}}
    operator = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", **process, "ts": us(moment), "dur": seconds * 1e6}
    flow = {"ph": "s", "id": 1, "cat": "fwdbwd", "name": "fwdbwd", **process, "ts": us(moment)}
    span = {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "PyTorch Profiler"}
    return {
        "baseTimeNanoseconds": base,
        "deviceProperties": [{"id": 0}] if args else [],
        "traceEvents": [label, thread, early, operator | {"args": args}, flow, span | {"ts": us(moment), "dur": 1.0}],
    }


def write_kernels(profile: Profile, rank: int, trace: Event) -> None:
    with gzip.open(kernels_file(profile.folder, rank), "wt") as file:
        json.dump(trace, file)


def test_operators_of_torch_lie_in_their_pieces(fresh: tuple[Profile, list[StepTimeline]], tmp_path: Path) -> None:
    profile, timelines = fresh
    origin = profile.ranks[0].steps[0].marks[0] - timelines[0].begin_of(0) * 1e9
    pieces = {
        rank: next(piece for piece in timelines[0].pieces[rank] if piece.cause is Cause.COMPUTE) for rank in range(3)
    }
    for rank, piece in pieces.items():
        write_kernels(profile, rank, kineto(profile, rank, origin + piece.begin * 1e9, piece.seconds))
    (path,) = write_trace(profile, timelines, str(tmp_path / "trace.json"))
    events = json.loads(path.read_text())["traceEvents"]
    check_format(events)
    assert not [event for event in events if event["name"] in ("aten::zeros", "PyTorch Profiler (0)")]
    names = named(events, "process_name")
    operators = [event for event in events if event["name"] == "aten::mm"]
    assert [names[event["pid"], 0] for event in operators] == [
        f"stage {rank} rank {rank} host{rank} torch.profiler CPU" for rank in range(3)
    ]
    for rank, event in enumerate(operators):
        assert event["ts"] == pytest.approx(pieces[rank].begin * 1e6, abs=1), "clocks are 40 ms apart"
        assert event["dur"] == pytest.approx(pieces[rank].seconds * 1e6, abs=1)
    flows = [event["id"] for event in events if event["ph"] == "s"]
    assert len(flows) == len(set(flows)), "ranks number theirs alike"


@pytest.mark.parametrize("text", [b"not gzip", gzip.compress(b"{}"), gzip.compress(b"[1]"), gzip.compress(b"{")[:-3]])
def test_a_broken_file_of_torch_is_named(
    fresh: tuple[Profile, list[StepTimeline]], tmp_path: Path, text: bytes
) -> None:
    profile, timelines = fresh
    kernels_file(profile.folder, 1).write_bytes(text)
    with pytest.raises(ProfileError, match=r"rank_1\.kernels\.json\.gz: not a whole trace"):
        write_trace(profile, timelines, str(tmp_path / "trace.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["profile"], "half a trace is left"


# ---- Perfetto

needs_perfetto = pytest.mark.skipif(what_is_missing() is not None, reason=what_is_missing() or "")
OURS = ("collectives", "link out backward", "link out forward", "operations", "steps")  # threads
SLICES = f"""
    SELECT process.pid, thread.name AS thread, slice.name, slice.category, slice.ts, slice.dur, slice.id,
           EXTRACT_ARG(slice.arg_set_id, 'args.microbatch') AS microbatch
    FROM slice JOIN thread_track ON slice.track_id = thread_track.id JOIN thread USING (utid) JOIN process USING (upid)
    WHERE thread.name IN {OURS}
"""
SPANS = f"SELECT pid, thread, name, category, ts, dur FROM ({SLICES})"
ARROWS = f"""
    WITH ours AS ({SLICES})
    SELECT start.id, start.pid, start.name, start.microbatch, finish.id, finish.pid, finish.name, finish.microbatch
    FROM flow JOIN ours AS start ON slice_out = start.id JOIN ours AS finish ON slice_in = finish.id
"""
NUM_SLICES = "SELECT COUNT() FROM slice"
ERRORS = "SELECT name, SUM(value) FROM stats WHERE severity = 'error' AND value > 0 GROUP BY name"
OVERLAPPING = "slice_drop_overlapping_complete_event"


def spans_of(events: list[Event]) -> list[tuple[Any, ...]]:
    """Of our threads, as `SPANS` has them: times in ns."""
    threads, spans = named(events, "thread_name"), [event for event in events if event["ph"] == "X"]
    found = [(event["pid"], threads.get((event["pid"], event["tid"])), event) for event in spans]
    return [
        (pid, thread, event["name"], event["cat"], round(event["ts"] * 1000), round(event["dur"] * 1000))
        for pid, thread, event in found
        if thread in OURS
    ]


def check_arrows(arrows: list[tuple[Any, ...]], timelines: list[StepTimeline]) -> None:
    """Each message has one of its own, from its send to its await."""
    expected: Counter[tuple[Any, ...]] = Counter()
    for delivery in (delivery for timeline in timelines for delivery in timeline.deliveries):
        message, index = delivery.message, delivery.action.microbatch_index
        what = f"{'gradient of ' if message.is_gradient else ''}{message.cargo.value} {index}"
        sender, receiver = first_pid(delivery.sender), first_pid(delivery.receiver)
        expected[sender, f"send {what}", index, receiver, f"await {what}", index] += 1
    assert Counter((*arrow[1:4], *arrow[5:]) for arrow in arrows) == expected
    for end in (0, 4):
        assert len({arrow[end] for arrow in arrows}) == len(arrows)


@needs_perfetto
def test_perfetto_finds_each_span_and_arrow(recorded: Recorded) -> None:
    errors, spans, arrows = ask(recorded.path, ERRORS, SPANS, ARROWS)
    assert errors == []
    assert sorted(spans) == sorted(spans_of(recorded.events))
    check_arrows(arrows, recorded.timelines)


@needs_perfetto
def test_perfetto_finds_each_span_of_the_files_of_ranks(
    made: tuple[Profile, list[StepTimeline]], tmp_path: Path
) -> None:
    for path in write_trace(*made, f"{tmp_path}/traces/"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        assert ask(path, ERRORS, NUM_SLICES) == [[], [(sum(event["ph"] == "X" for event in events),)]]


@needs_perfetto
def test_perfetto_says_what_is_wrong_with_a_trace(made: tuple[Profile, list[StepTimeline]], tmp_path: Path) -> None:
    """Else the tests above would show nothing: a pass is longer by half, an arrow ends a ms later."""
    (path,) = write_trace(*made, str(tmp_path / "trace.json"))
    trace = json.loads(path.read_text())
    one = next(event for event in trace["traceEvents"] if event.get("cat") == Cause.COMPUTE.value)
    end = next(event for event in trace["traceEvents"] if event["ph"] == "f")
    one["dur"] *= 1.5
    end["ts"] += 1000
    path.write_text(json.dumps(trace))
    errors, arrows = ask(path, ERRORS, ARROWS)
    assert [name for name, _ in errors] == [OVERLAPPING]
    with pytest.raises(AssertionError):
        check_arrows(arrows, made[1])


@needs_perfetto
def test_perfetto_finds_ours_beside_those_of_torch(fresh: tuple[Profile, list[StepTimeline]], tmp_path: Path) -> None:
    """What overlaps in torch's own file is left out."""
    profile, timelines = fresh
    begin = time.time_ns() - 10**7  # torch.profiler sets its clock by it, not exactly
    seen = KernelTrace(torch.device("cpu"))
    (torch.ones(8, 8, requires_grad=True) @ torch.ones(8, 8)).sum().backward()
    seen.stop()
    seen.write(profile.folder, 0)
    first = replace(profile.ranks[0], epoch_ns=begin - profile.ranks[0].steps[0].marks[0])
    profile = replace(profile, ranks=(first, *profile.ranks[1:]))
    (path,) = write_trace(profile, timelines, str(tmp_path / "trace.json"))
    events = json.loads(path.read_text())["traceEvents"]
    assert {"aten::mm", "fwdbwd"} <= {event["name"] for event in events}
    errors, spans, arrows, num_slices = ask(path, ERRORS, SPANS, ARROWS, NUM_SLICES)
    dropped = dict(errors)
    assert dropped.keys() <= {OVERLAPPING}
    assert num_slices == [(sum(event["ph"] == "X" for event in events) - dropped.get(OVERLAPPING, 0),)]
    assert sorted(spans) == sorted(spans_of(events))
    check_arrows(arrows, timelines)


# ---- files


def test_compressed_is_the_same(made: tuple[Profile, list[StepTimeline]], tmp_path: Path) -> None:
    (plain,) = write_trace(*made, str(tmp_path / "trace.json"))
    (small,) = write_trace(*made, str(tmp_path / "trace.json.gz"))
    assert gzip.decompress(small.read_bytes()) == plain.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.json", "trace.json.gz"]


def test_a_folder_has_a_file_of_each_rank(made: tuple[Profile, list[StepTimeline]], tmp_path: Path) -> None:
    paths = write_trace(*made, f"{tmp_path}/traces/")
    assert paths == tuple(tmp_path / "traces" / f"rank_{rank}.json.gz" for rank in range(3))
    for rank, path in enumerate(paths):
        trace = json.loads(gzip.decompress(path.read_bytes()))
        assert trace["distributedInfo"] == {"rank": rank, "world_size": 3}
        check_format(trace["traceEvents"])
        assert {event["ph"] for event in trace["traceEvents"]} == {"X", "M"}, "arrows whose other ends are elsewhere"
    assert write_trace(*made, str(tmp_path / "traces")) == paths  # over the former ones


def bad_places(folder: Path) -> Iterator[tuple[str, str]]:
    (folder / "kept").mkdir()
    (folder / "kept" / "old.json").write_text("{}")
    (folder / "file").write_text("")
    yield str(folder / "trace.txt"), r"trace\.txt: name a file that ends with \.json or \.json\.gz"
    yield str(folder / "none" / "trace.json"), f"there is no folder {folder}/none"
    yield f"{folder}/none/traces/", f"there is no folder {folder}/none"
    yield str(folder / "kept"), r"kept holds old\.json"
    yield str(folder / "file" / "trace.json"), f"there is no folder {folder}/file"
    yield f"{folder}/file/", "File exists"


def test_a_place_that_cannot_be_written_is_named(made: tuple[Profile, list[StepTimeline]], tmp_path: Path) -> None:
    for place, message in bad_places(tmp_path):
        with pytest.raises(ConfigError, match=f"^--trace: .*{message}") as raised:
            write_trace(*made, place)
        assert "\n" not in str(raised.value)


# ---- HolisticTraceAnalysis


def analysis(folder: Path) -> Any:
    """Of all steps; by default it leaves out the last one."""
    hta = pytest.importorskip("hta.trace_analysis")
    return hta.TraceAnalysis(trace_dir=str(folder), include_last_profiler_step=True)


def test_holistic_trace_analysis_finds_the_same_shares(
    made: tuple[Profile, list[StepTimeline]], tmp_path: Path
) -> None:
    write_trace(*made, f"{tmp_path}/traces/")
    found = analysis(tmp_path / "traces")
    assert found.t.get_ranks() == [0, 1, 2]
    assert list(map(int, found.t.get_iterations())) == [3, 4]
    breakdown = found.get_temporal_breakdown(visualize=False).set_index("rank")
    for of_rank in account(*made).ranks:
        computing = of_rank.seconds[Cause.COMPUTE] * len(made[1]) * 1e6
        pieces = sum(piece.cause is Cause.COMPUTE for each in made[1] for piece in each.pieces[of_rank.rank])
        # It rounds each event to whole us.
        assert breakdown["compute_time(us)"][of_rank.rank] == pytest.approx(computing, abs=2 * pieces)
    overlap = found.get_comm_comp_overlap(visualize=False)
    assert list(overlap["rank"]) == [0, 1, 2] and (overlap["comp_comm_overlap_pctg"] > 0).any()


def test_a_devices_kernels_take_the_place_of_ours(fresh: tuple[Profile, list[StepTimeline]], tmp_path: Path) -> None:
    profile, timelines = fresh
    write_kernels(profile, 0, kineto(profile, 0, 10**6, 0.001, stream=7, correlation=5, device=0))
    first, second, _ = write_trace(profile, timelines, f"{tmp_path}/traces/")
    trace = json.loads(gzip.decompress(first.read_bytes()))
    kernels = [event["name"] for event in trace["traceEvents"] if "stream" in event.get("args", ())]
    assert kernels == ["aten::mm"] and trace["deviceProperties"] == [{"id": 0}]
    others = json.loads(gzip.decompress(second.read_bytes()))["traceEvents"]
    assert {event["args"]["stream"] for event in others if event.get("cat") == "kernel"} == {1, 2, 3}
