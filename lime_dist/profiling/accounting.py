"""A profile in sums: where each rank's step went, and what each boundary carried. Pure data.

Figures are of a step, the mean of those recorded; seconds unless a name says otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.deliveries import Delivery
from lime_dist.profiling.operation_times import without_core
from lime_dist.profiling.profile_files import MeasuredLink, Profile
from lime_dist.profiling.timeline import LINK, Cause, StepTimeline


@dataclass(frozen=True, kw_only=True)
class RankAccount:
    """seconds: by cause; they sum to step_seconds. without_core: of computing, for which other processes had the core."""

    rank: int
    stage: int
    host: str
    step_seconds: float
    seconds: Mapping[Cause, float]
    without_core: float


@dataclass(frozen=True, kw_only=True)
class BoundaryAccount:
    """One way over one boundary, of all pairs of ranks on it together; times are of the mean pair.

    sent_bytes, planned_bytes: a step. busy: for which a message was on the link. transfer: what the messages would have taken
    alone. exposed: for which ranks waited, the sender having done its part; exposed_by: by what they waited for.
    bytes_per_second: reached while transferring. measured: what the link carried alone before, or None.
    """

    boundary: int
    from_stage: int
    to_stage: int
    direction: str  # forward | backward
    planned_bytes: int
    sent_bytes: int
    busy: float
    transfer: float
    exposed: float
    exposed_by: Mapping[str, float]
    measured: MeasuredLink | None

    @property
    def name(self) -> str:
        return f"{self.from_stage}>{self.to_stage}"

    @property
    def bytes_per_second(self) -> float:
        return self.sent_bytes / self.transfer if self.transfer else 0.0

    @property
    def hidden_share(self) -> float:
        """Of the time on the link that nobody waited."""
        return 1 - min(1.0, self.exposed / self.busy) if self.busy else 1.0


@dataclass(frozen=True, kw_only=True)
class Account:
    """A whole profile's. ranks: by global rank. boundaries: forward, then backward."""

    step_seconds: float
    ranks: tuple[RankAccount, ...]
    boundaries: tuple[BoundaryAccount, ...]

    @property
    def bubble_share(self) -> float:
        """Of all ranks' time, waiting for other stages to compute."""
        return self.share_of(Cause.DEPENDENCY)

    def share_of(self, *causes: Cause) -> float:
        total = sum(rank.step_seconds for rank in self.ranks)
        return sum(rank.seconds[cause] for rank in self.ranks for cause in causes) / total

    @property
    def exposed_seconds(self) -> float:
        """For which the mean rank waited for links."""
        return fmean(sum(rank.seconds[cause] for cause in LINK) for rank in self.ranks)


def account(profile: Profile, timelines: Sequence[StepTimeline]) -> Account:
    ranks = tuple(_rank_account(profile, timelines, record.rank) for record in profile.ranks)
    return Account(
        # Of one rank: from the first to begin to the last to end is longer, as a rank that is done begins the next step.
        step_seconds=max(rank.step_seconds for rank in ranks),
        ranks=ranks,
        boundaries=tuple(_boundary_accounts(profile, timelines)),
    )


def _rank_account(profile: Profile, timelines: Sequence[StepTimeline], rank: int) -> RankAccount:
    seconds = dict.fromkeys(Cause, 0.0)
    for timeline in timelines:
        for piece in timeline.pieces[rank]:
            seconds[piece.cause] += piece.seconds / len(timelines)
    return RankAccount(
        rank=rank,
        stage=profile.plan.layout.coordinate(rank).pp_rank,
        host=profile.ranks[rank].host,
        step_seconds=fmean(each.pieces[rank][-1].end - each.begin_of(rank) for each in timelines),
        seconds=seconds,
        without_core=without_core(profile, rank),
    )


def _boundary_accounts(profile: Profile, timelines: Sequence[StepTimeline]) -> Iterable[BoundaryAccount]:
    by_way: dict[tuple[Kind, int], list[list[Delivery]]] = defaultdict(list)
    for timeline in timelines:
        of_step: dict[tuple[Kind, int], list[Delivery]] = defaultdict(list)
        for delivery in timeline.deliveries:
            of_step[delivery.action.kind, delivery.boundary].append(delivery)
        for way, deliveries in of_step.items():
            by_way[way].append(deliveries)
    for (kind, boundary), steps in sorted(by_way.items(), key=lambda each: (each[0][0] is Kind.BACKWARD, each[0][1])):
        yield _boundary_account(profile, kind, boundary, steps)


def _boundary_account(
    profile: Profile, kind: Kind, boundary: int, steps: Sequence[Sequence[Delivery]]
) -> BoundaryAccount:
    layout = profile.plan.layout
    ends = boundary, (boundary + 1) % layout.pp
    sender, receiver = ends if kind is Kind.FORWARD else ends[::-1]
    deliveries = [delivery for step in steps for delivery in step]
    times, pairs = len(steps), layout.tp * layout.dp
    exposed_by: dict[str, float] = defaultdict(float)
    for delivery in deliveries:
        exposed_by[cargo_name(delivery)] += delivery.exposed_seconds / (times * pairs)
    return BoundaryAccount(
        boundary=boundary,
        from_stage=sender,
        to_stage=receiver,
        direction=kind.name.lower(),
        planned_bytes=_planned_bytes(profile.plan, sender, kind),
        sent_bytes=_sent_bytes(profile, sender, kind),
        busy=sum(delivery.link_seconds for delivery in deliveries) / (times * pairs),
        transfer=sum(delivery.transfer_seconds for delivery in deliveries) / (times * pairs),
        exposed=sum(exposed_by.values()),
        exposed_by=dict(exposed_by),
        measured=next((link for link in profile.links if (link.from_stage, link.to_stage) == (sender, receiver)), None),
    )


def _sent_bytes(profile: Profile, stage_index: int, kind: Kind) -> int:
    """Of the mean rank of a stage, as the transport counted them."""
    way = 0 if kind is Kind.FORWARD else 1
    of_stage = [one for one in profile.ranks if profile.plan.layout.coordinate(one.rank).pp_rank == stage_index]
    return round(fmean(step.sent_bytes[way] for record in of_stage for step in record.steps))


def cargo_name(delivery: Delivery) -> str:
    return ("gradient of " if delivery.message.is_gradient else "") + delivery.message.cargo.value


def _planned_bytes(plan: RunPlan, stage_index: int, kind: Kind) -> int:
    return plan.num_microbatches * sum(message.num_bytes for message in plan.stages[stage_index].sent(kind))
