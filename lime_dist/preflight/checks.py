"""The checks of one rank, in order: its host, who came, the shared folder, the clocks, then the links.

Rank 0 judges and tells the others; every wait ends after a few times `seconds`.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lime_dist.cluster.nodelist import planned_hosts
from lime_dist.config import Config
from lime_dist.errors import USER_ERROR_EXIT_CODE, ConfigError, LimeDistError, one_line
from lime_dist.lifecycle.launcher import Place, host_name
from lime_dist.lifecycle.local import leave
from lime_dist.plan.run_plan import RunPlan
from lime_dist.preflight.fabric import Crossing, time_all_reduce, time_crossings
from lime_dist.preflight.folder import find_missing, leave_file, make_folder, remove_folder
from lime_dist.preflight.host import Arrival, Host, blame_missing, judge, read_arrival
from lime_dist.preflight.input_files import check_files
from lime_dist.preflight.meeting import Meeting
from lime_dist.preflight.signed_json import Topic
from lime_dist.preflight.summary import boundary_reports, measured_step_seconds, rank_report, slow_boundaries
from lime_dist.training.world import join_world

_HOST_ROUNDS = 6  # waits of `seconds` each; more than the checks of hosts have
_LINK_ROUNDS = 4
_NO_LINKS: dict[str, Any] = {"all_reduce_seconds": None, "step_seconds": None, "boundaries": [], "warnings": []}


@dataclass(frozen=True)
class Verdict:
    """What rank 0 tells all. bad: host -> what is wrong; "" for ranks whose host cannot be known."""

    bad: dict[str, list[str]] = field(default_factory=dict)
    user_error: str | None = None

    @property
    def exit_code(self) -> int:
        return USER_ERROR_EXIT_CODE if self.user_error else int(bool(self.bad))


# All that ranks tell one another here.
_ARRIVAL: Topic[Arrival] = Topic("arrival", Arrival)
_FOLDER: Topic[int | None] = Topic("folder", int | None)  # the number of that which each host is to write into
_FOLDER_PROBLEM: Topic[str | None] = Topic("folder_problem", str | None)
_VERDICT: Topic[Verdict] = Topic("verdict", Verdict)
_CROSSINGS: Topic[list[Crossing]] = Topic("crossings", list[Crossing])


@dataclass(frozen=True)
class Findings:
    """report: as JSON has it (see `report`)."""

    verdict: Verdict
    report: dict[str, Any]


def run_preflight(
    load: Callable[[], RunPlan], place: Place, seconds: float, finish: Callable[[Findings], None]
) -> Verdict:
    """`load`: the plan of the run, as this host reads it; `seconds`: how long to wait for another rank.

    `finish` tells the user, on rank 0 alone. Collective: world. Raises: MeetingFailed when this rank and rank 0 do not
    find each other.
    """
    with _bounded(seconds * _HOST_ROUNDS, "the checks of hosts"):
        plan, arrival = _read(load, place)
        config = plan.config if plan is not None else None
        meeting = Meeting.join(place, seconds)
        meeting.put(_ARRIVAL, arrival)
        if place.rank > 0:
            verdict, arrivals = _follow(meeting, config, place, arrival), {}
        else:
            arrivals = meeting.take(_ARRIVAL, range(place.world_size))
            verdict = _lead(meeting, config, place, arrivals, seconds)
    report = _host_report(verdict, config, arrivals)
    if plan is not None and not verdict.exit_code:
        with _bounded(seconds * (_LINK_ROUNDS + 2 * plan.layout.pp), "the checks of links"):
            report |= _measure_links(meeting, plan, place, arrivals, seconds)
    with meeting.last_word(arrivals):
        if place.rank == 0:
            finish(Findings(verdict, report))
    return verdict


def _host_report(verdict: Verdict, config: Config | None, arrivals: Mapping[int, Arrival]) -> dict[str, Any]:
    ranks = rank_report(config.layout, _names(arrivals)) if config is not None else []
    return {"passed": not verdict.bad, "bad": verdict.bad, "ranks": ranks, **_NO_LINKS}


def _names(arrivals: Mapping[int, Arrival]) -> dict[int, str]:
    return {rank: arrival.host for rank, arrival in arrivals.items()}


def _read(load: Callable[[], RunPlan], place: Place) -> tuple[RunPlan | None, Arrival]:
    """An error of every rank is the user's; one of this host alone is the host's, and rank 0 tells which."""
    try:
        plan = load()
        if place.local_rank == 0:
            check_files(plan.config)
    except LimeDistError as error:
        return None, Arrival(host=host_name(), local_rank=place.local_rank, problem=one_line(error))
    return plan, read_arrival(plan.config, place)


# ---- hosts


def _follow(meeting: Meeting, config: Config | None, place: Place, arrival: Arrival) -> Verdict:
    number = meeting.hear(_FOLDER)
    if number is not None and config is not None and arrival.facts is not None:
        meeting.put(_FOLDER_PROBLEM, leave_file(Path(config.run.dir), _folder_name(number), place.rank))
        meeting.answer_clock()
    return meeting.hear(_VERDICT)


def _lead(
    meeting: Meeting, config: Config | None, place: Place, arrivals: Mapping[int, Arrival], seconds: float
) -> Verdict:
    """Rank 0's part."""
    verdict = _judge_arrivals(arrivals, place.world_size, seconds)
    if verdict.exit_code or config is None:
        meeting.tell(_FOLDER, None)
    else:
        try:
            verdict = _judge_hosts(meeting, config, arrivals)
        except ConfigError as error:
            meeting.tell(_FOLDER, None)
            verdict = Verdict(user_error=one_line(error))
    meeting.tell(_VERDICT, verdict)
    return verdict


def _judge_arrivals(arrivals: Mapping[int, Arrival], world_size: int, seconds: float) -> Verdict:
    """Who did not come, and who could not read what the run reads."""
    speakers = [arrival for arrival in arrivals.values() if arrival.local_rank == 0]
    if all(arrival.problem for arrival in speakers):
        return Verdict(user_error=arrivals[0].problem)
    missing = blame_missing(planned_hosts(world_size), _names(arrivals), seconds)
    bad = {host: [text] for host, text in missing.items()}
    for arrival in arrivals.values():
        if arrival.problem and arrival.problem not in bad.setdefault(arrival.host, []):
            bad[arrival.host].append(arrival.problem)
    return Verdict(bad)


def _judge_hosts(meeting: Meeting, config: Config, arrivals: Mapping[int, Arrival]) -> Verdict:
    speakers = [rank for rank, arrival in arrivals.items() if arrival.facts is not None and rank > 0]
    problems = _check_folder(meeting, Path(config.run.dir), speakers)
    clocks = {rank: meeting.measure_clock(rank) for rank in speakers} if 0 not in problems else {}
    hosts = _hosts(arrivals, problems, clocks)
    judged = {host.name: judge(host, hosts, config) for host in hosts}
    return Verdict({host: wrong for host, wrong in judged.items() if wrong})


def _folder_name(number: int) -> str:
    return f".preflight-{number:x}"


def _check_folder(meeting: Meeting, run_dir: Path, speakers: list[int]) -> dict[int, str]:
    """What is wrong with run.dir, by the rank that speaks for the host."""
    number = uuid.uuid4().int
    folder = _folder_name(number)
    problem = make_folder(run_dir, folder)
    try:
        meeting.tell(_FOLDER, number if problem is None else None)
        if problem is not None:
            return {0: problem}
        answers = dict.fromkeys(speakers, f"its check of run.dir {run_dir} did not end") | meeting.take(
            _FOLDER_PROBLEM, speakers
        )
        written = [rank for rank, answer in answers.items() if answer is None]
        lost = f"what it writes into run.dir {run_dir} does not appear on rank 0's host"
        answers |= dict.fromkeys(find_missing(run_dir, folder, written), lost)
        return {rank: answer for rank, answer in answers.items() if answer is not None}
    finally:
        remove_folder(run_dir, folder)


def _hosts(
    arrivals: Mapping[int, Arrival], problems: Mapping[int, str], clocks: Mapping[int, tuple[float, float] | None]
) -> list[Host]:
    """By host, rank 0's first."""
    ranks: dict[str, list[int]] = {}
    for rank, arrival in arrivals.items():
        ranks.setdefault(arrival.host, []).append(rank)
    return [_host(name, own, arrivals, problems, clocks) for name, own in ranks.items()]


def _host(
    name: str,
    ranks: list[int],
    arrivals: Mapping[int, Arrival],
    problems: Mapping[int, str],
    clocks: Mapping[int, tuple[float, float] | None],
) -> Host:
    unanswered = ["it did not answer when asked the time"] * any(clocks.get(rank, 0) is None for rank in ranks)
    return Host(
        name=name,
        ranks=tuple(ranks),
        facts=next((facts for rank in ranks if (facts := arrivals[rank].facts) is not None), None),
        gpus=tuple(gpu for rank in ranks if (gpu := arrivals[rank].gpu) is not None),
        clock=next((clock for rank in ranks if (clock := clocks.get(rank)) is not None), (0.0, 0.0)),
        problems=(*(problems[rank] for rank in ranks if rank in problems), *unanswered),
    )


# ---- links


def _measure_links(
    meeting: Meeting, plan: RunPlan, place: Place, arrivals: Mapping[int, Arrival], seconds: float
) -> dict[str, Any]:
    """What the report says of links; empty on all ranks but rank 0. Collective: world."""
    config = plan.config
    groups, device = join_world(_with_timeout(config, seconds), place, meeting.store)
    all_reduce_seconds = time_all_reduce(device)
    meeting.put(_CROSSINGS, time_crossings(groups, plan, device))
    if place.rank > 0:
        return {}
    crossings = [crossing for own in meeting.take(_CROSSINGS, range(place.world_size)).values() for crossing in own]
    step_seconds = measured_step_seconds(Path(config.run.dir))
    boundaries = boundary_reports(plan, crossings, step_seconds)
    return {
        "all_reduce_seconds": all_reduce_seconds,
        "step_seconds": step_seconds,
        "boundaries": boundaries,
        "warnings": slow_boundaries(boundaries, _names(arrivals)),
    }


def _with_timeout(config: Config, seconds: float) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, timeout_seconds=seconds))


@contextmanager
def _bounded(seconds: float, what: str) -> Iterator[None]:
    """Ends this process should it hang where no timeout reaches, as in a call to a file system that has gone."""
    timer = threading.Timer(seconds, _give_up, (f"host {host_name()}: {what} did not end within {seconds:.0f} s",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(message: str) -> None:
    print(f"lime-dist: {message}", file=sys.stderr)
    leave(1)
