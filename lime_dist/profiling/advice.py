"""What a profile tells one to know and to do, in three sentences. Pure data."""

from __future__ import annotations

from collections.abc import Sequence

from lime_dist.profiling.accounting import Account
from lime_dist.profiling.findings import WORTH_NAMING, Fault
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import Cause


def sentences(profile: Profile, account: Account, faults: Sequence[Fault]) -> list[str]:
    """What to know and do, in three sentences."""
    step = account.step_seconds
    return [_first(step, faults), _second(account, faults), _third(profile, account)]


def _first(step: float, faults: Sequence[Fault]) -> str:
    if not faults:
        return f"A step takes {_ms(step)}, and no link, rank or data loader stands out."
    named = "; ".join(f"{_ms(fault.seconds)} to {fault.name}" for fault in faults)
    return f"A step takes {_ms(step)}; of these go {named}."


def _second(account: Account, faults: Sequence[Fault]) -> str:
    if faults:
        mend, share = faults[0].mend, faults[0].seconds / account.step_seconds
        return f"{mend[0].upper()}{mend[1:]}: that would shorten the step by about {100 * share:.0f} %."
    shares = {text: account.share_of(cause) for cause, text in _SHARES.items()}
    text, share = max(shares.items(), key=lambda item: item[1])
    worst = max(account.boundaries, key=lambda each: each.exposed, default=None)
    exposed = 0.0 if worst is None else worst.exposed / account.step_seconds
    if share > max(exposed, _LARGE):
        return f"Of all ranks' time {100 * share:.0f} % goes to {text}."
    if worst is None or exposed < WORTH_NAMING:
        return (
            "What crosses boundaries is hidden: no rank waits long for a link."
            if worst
            else "Nothing crosses a boundary."
        )
    kind = max(worst.exposed_by, key=lambda name: worst.exposed_by[name])
    return (
        f"Stage {worst.to_stage} waits {_ms(worst.exposed)} a step for the link from stage {worst.from_stage}, most of it for the {kind}: try "
        "pipeline.warmup=auto, or a pattern that sends less (`lime-dist plan --predict`)."
    )


_LARGE = 0.1  # of all ranks' time
_SHARES = {
    Cause.TENSOR: "collectives of the tensor group: a smaller parallel.tp, or one within a node, has less of them",
    Cause.DATA_PARALLEL: "the sum of gradients over replicas: more microbatches a step make it weigh less",
    Cause.OPTIMIZER: "the optimizer and the norm: ZeRO spreads it over replicas, larger batches make it weigh less",
    Cause.HOST: "posting, sending and taking in messages: a higher pipeline.min_message makes them fewer",
}


def _third(profile: Profile, account: Account) -> str:
    waits = sum(rank.without_core for rank in account.ranks) / sum(rank.step_seconds for rank in account.ranks)
    if waits > _LARGE:
        return (
            f"For {100 * waits:.0f} % of the time ranks were ready to compute and had no core: there are more of them than cores, "
            "so that this says little about a machine with a device for each."
        )
    share, own = account.bubble_share, schedule_bubble(profile)
    text = f"Waiting for other stages (the bubble) takes {100 * share:.0f} % of all ranks' time"
    if own == 0 or share < _SMALL_BUBBLE:
        return f"{text}: there is little to gain."
    text += f"; equal stages under this schedule would wait {100 * own:.0f} % of their passes' time"
    return f"{text}. `lime-dist plan CONFIG --predict {profile.folder}` says what more microbatches or virtual stages would bring."


_SMALL_BUBBLE = 0.05


def schedule_bubble(profile: Profile) -> float:
    """(P - 1) / (v m + P - 1) of P stages of v chunks and m microbatches (Narayanan et al. 2021, section 2.2)."""
    plan = profile.plan
    idle = len(plan.stages) - 1
    return idle / (plan.virtual_stages * plan.num_microbatches + idle)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
