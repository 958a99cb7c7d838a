"""What a profile tells one to know and to do, in three sentences. Pure data."""

from __future__ import annotations

from collections.abc import Sequence

from lime_dist.profiling.accounting import Account
from lime_dist.profiling.findings import WORTH_NAMING, Fault
from lime_dist.profiling.profile_files import Profile


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
        mend = faults[0].mend
        return f"{mend[0].upper()}{mend[1:]}: mended, a step is about {100 * faults[0].seconds / account.step_seconds:.0f} % shorter."
    worst = max(account.boundaries, key=lambda each: each.exposed, default=None)
    if worst is None or worst.exposed < WORTH_NAMING * account.step_seconds:
        return "What crosses boundaries is hidden behind computing."
    kind = max(worst.exposed_by, key=lambda name: worst.exposed_by[name])
    return (
        f"Boundary {worst.name} is waited for {_ms(worst.exposed)} a step, most of it for the {kind}: try pipeline.warmup=auto, "
        "or a pattern that sends less (`lime-dist plan --predict`)."
    )


def _third(profile: Profile, account: Account) -> str:
    share, own = account.bubble_share, schedule_bubble(profile)
    text = f"Waiting for other stages to compute (the bubble) takes {100 * share:.0f} % of all ranks' time, {100 * own:.0f} % in a perfect schedule of equal stages"
    if share < 0.05:
        return f"{text}: little is to be had there."
    return f"{text}: raise pipeline.num_microbatches or parallel.virtual_stages, as `lime-dist plan --predict` says what each brings."


def schedule_bubble(profile: Profile) -> float:
    """(P - 1) / (v m + P - 1) of P stages of v chunks and m microbatches (Narayanan et al. 2021, section 2.2)."""
    plan = profile.plan
    idle = len(plan.stages) - 1
    return idle / (plan.virtual_stages * plan.num_microbatches + idle)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
