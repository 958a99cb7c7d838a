"""A profile as one terminal screen: three sentences, boundaries, ranks, the critical path. Pure data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from textwrap import wrap
from typing import Any

from lime_dist.formats import format_bytes, format_rate
from lime_dist.plan.table import align_columns
from lime_dist.profiling.accounting import Account, BoundaryAccount, RankAccount
from lime_dist.profiling.critical_path import Segment
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import Cause

MAX_RANKS = 16  # of the table; of more the slowest of each stage
LONGEST_MESSAGES = 3
WIDTH = 120  # columns of the terminal


def profile_screen(profile: Profile, account: Account, path: Sequence[Segment], sentences: Sequence[str]) -> str:
    """path: of the step nearest to the mean."""
    return "\n".join(
        [
            *_wrapped(_head(profile, account)),
            "",
            *_wrapped(sentences),
            "",
            *_boundary_lines(account),
            *([""] if account.boundaries else []),
            *_rank_lines(account),
            "",
            *_wrapped(_path_lines(path)),
        ]
    )


def _wrapped(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from wrap(text, WIDTH, break_on_hyphens=False)


def _head(profile: Profile, account: Account) -> Iterator[str]:
    plan = profile.plan
    chunks = f", {plan.virtual_stages} virtual stages" if plan.virtual_stages > 1 else ""
    first, last = profile.steps[0], profile.steps[-1]
    steps = f"steps {first} to {last}" if last > first else f"step {first}"
    yield (
        f"{steps} of {plan.layout}{chunks}, {plan.schedule}, {plan.num_microbatches} microbatches, pattern "
        f"{plan.transfer.pattern.name}, policy {plan.config.depth.policy}, on {profile.ranks[0].device}"
    )
    error, drift = 1e6 * profile.clock_error_seconds, 1e6 * profile.largest_drift
    clocks = f"to {error:.0f} us, drift {drift:.1f} us/s" if error else "one clock"
    unit = "seconds" if _is_long(account) else "ms"
    slowed = "; torch.profiler (profile.kernels) has slowed these steps" if plan.config.profile.kernels else ""
    yield f"times are of the mean step, in tables in {unit}; clocks of ranks: {clocks}{slowed}"


def _is_long(account: Account) -> bool:
    """So that numbers stay narrow, and of one unit, which tables then need not say."""
    return account.step_seconds >= 10


def _in_table(account: Account) -> Callable[[float], str]:
    return (lambda seconds: f"{seconds:.2f}") if _is_long(account) else (lambda seconds: f"{1e3 * seconds:.1f}")


def _boundary_lines(account: Account) -> list[str]:
    if not account.boundaries:
        return []
    head = (
        "boundary",
        "",
        "sent",
        "planned",
        "on link",
        "bandwidth",
        "alone before",
        "hidden",
        "exposed",
        "waited most for",
    )
    rows = [_boundary_row(each, _in_table(account)) for each in account.boundaries]
    return [
        *align_columns(head, rows),
        "bandwidth: of messages that were alone on the link; exposed: a rank waited for it",
    ]


def _boundary_row(each: BoundaryAccount, in_table: Callable[[float], str]) -> tuple[str, ...]:
    longest = max(each.exposed_by, key=lambda cargo: each.exposed_by[cargo])
    return (
        each.name,
        each.direction,
        format_bytes(each.sent_bytes),
        format_bytes(each.planned_bytes),
        in_table(each.busy),
        format_rate(each.bytes_per_second),
        "-" if each.measured is None else format_rate(each.measured.bytes_per_second),
        f"{100 * each.hidden_share:.0f} %",
        in_table(each.exposed),
        longest if each.exposed_by[longest] > 0 else "-",
    )


_COLUMNS = {
    "compute": Cause.COMPUTE,
    "bubble": Cause.DEPENDENCY,
    "queue": Cause.QUEUE,
    "transfer": Cause.TRANSFER,
    "tp": Cause.TENSOR,
    "dp": Cause.DATA_PARALLEL,
    "embed": Cause.EMBEDDING,
    "agree": Cause.AGREEMENT,
    "optim": Cause.OPTIMIZER,
    "data": Cause.DATA,
    "host": Cause.HOST,
}


def _rank_lines(account: Account) -> list[str]:
    shown = _shown_ranks(account)
    columns = {name: cause for name, cause in _COLUMNS.items() if any(rank.seconds[cause] > 0 for rank in shown)}
    with_cores, in_table = any(rank.without_core > 0 for rank in shown), _in_table(account)
    head = ("rank", "stage", "step", *columns, *(("no core",) if with_cores else ()))
    rows = [
        (
            str(rank.rank),
            str(rank.stage),
            in_table(rank.step_seconds),
            *(in_table(rank.seconds[cause]) for cause in columns.values()),
            *((in_table(rank.without_core),) if with_cores else ()),
        )
        for rank in shown
    ]
    left_out = len(account.ranks) - len(shown)
    notes = [f"{left_out} more ranks: of each stage the one that computes longest is shown"] if left_out else []
    if with_cores:
        notes.append("no core: part of compute in which another process had the core")
    return [*align_columns(head, rows), *notes]


def _shown_ranks(account: Account) -> list[RankAccount]:
    if len(account.ranks) <= MAX_RANKS:
        return list(account.ranks)
    by_stage: dict[int, list[RankAccount]] = defaultdict(list)
    for rank in account.ranks:
        by_stage[rank.stage].append(rank)
    return [max(ranks, key=lambda one: one.seconds[Cause.COMPUTE]) for ranks in by_stage.values()]


def _path_lines(path: Sequence[Segment]) -> Iterator[str]:
    total = sum(segment.seconds for segment in path)
    parts = sorted(path_parts(path).items(), key=lambda part: -part[1])
    named = ", ".join(f"{name} {_ms(seconds)}" for name, seconds in parts[:6])
    yield f"critical path of the step nearest to the mean, {_ms(total)}: {named}"
    messages = sorted((one for one in path if one.kind == "message"), key=lambda one: -one.seconds)
    if messages:
        longest = "; ".join(f"{one.text}, {_ms(one.seconds)}" for one in messages[:LONGEST_MESSAGES])
        yield f"longest messages on it: {longest}, of {_ms(total)}"


def path_parts(path: Sequence[Segment]) -> dict[str, float]:
    """Seconds of the path by where they are spent."""
    parts: dict[str, float] = defaultdict(float)
    for segment in path:
        parts[_part(segment)] += segment.seconds
    return dict(parts)


def _part(segment: Segment) -> str:
    if segment.kind == "compute":
        return f"stage {segment.stage} computes"
    if segment.kind == "message":
        return f"messages over {segment.text.rsplit(' over ', 1)[1]}"
    return {"collective": "collectives", "wait": "the step before", "host": "host and optimizer"}[segment.kind]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


# ---- JSON


def profile_report(
    profile: Profile, account: Account, path: Sequence[Segment], sentences: Sequence[str]
) -> dict[str, Any]:
    """The same for scripts, in seconds and bytes. critical_path: of the step nearest to the mean."""
    return {
        "steps": list(profile.steps),
        "step_seconds": account.step_seconds,
        "bubble_share": account.bubble_share,
        "clock_error_seconds": profile.clock_error_seconds,
        "clock_drift": profile.largest_drift,
        "layout": asdict(profile.plan.layout),
        "sentences": list(sentences),
        "boundaries": [
            {
                "boundary": each.name,
                "direction": each.direction,
                "planned_bytes": each.planned_bytes,
                "sent_bytes": each.sent_bytes,
                "busy_seconds": each.busy,
                "transfer_seconds": each.transfer,
                "exposed_seconds": each.exposed,
                "exposed_by": dict(each.exposed_by),
                "bytes_per_second": each.bytes_per_second,
                "hidden_share": each.hidden_share,
                "measured_bytes_per_second": None if each.measured is None else each.measured.bytes_per_second,
            }
            for each in account.boundaries
        ],
        "ranks": [
            {
                "rank": rank.rank,
                "stage": rank.stage,
                "host": rank.host,
                "step_seconds": rank.step_seconds,
                "seconds": {cause.value: seconds for cause, seconds in rank.seconds.items()},
                "without_core_seconds": rank.without_core,
            }
            for rank in account.ranks
        ],
        "critical_path": [
            {"begin": one.begin, "end": one.end, "rank": one.rank, "kind": one.kind, "text": one.text} for one in path
        ],
    }
