"""What is done about a step that goes wrong: its loss or gradient norm spikes or is not finite.

Pure: all ranks know the numbers that it is fed with, and so come to the same verdict without telling each other. What a
bad step is follows OLMo-core's SkipStepOptimizer (a rolling mean and deviation; here of good steps only, so that a bad one does
not excuse the next); going back and passing over the batches PaLM (arXiv 2204.02311, section 5.1). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from lime_dist.config import SpikesConfig


class Action(Enum):
    TAKE = auto()  # the step is good
    SKIP = auto()  # make no update; the schedule and the data go on
    RETURN = auto()  # the same, and go back to a checkpoint of before the first bad step
    STOP = auto()  # and do not start again


@dataclass(frozen=True, kw_only=True)
class SpikeState:
    """What a run has behind it; a checkpoint holds it, so that a resumed run judges as one that went on."""

    losses: tuple[float, ...] = ()  # of the last good steps, oldest first, where `loss_sigma` needs them
    grad_norms: tuple[float, ...] = ()  # likewise
    bad_steps: tuple[int, ...] = ()  # skipped in the last `window` steps; none of before the last return
    num_skipped: int = 0  # of the steps that led here
    num_returns: int = 0  # of the run
    samples_passed_over: int = 0  # by all of them

    @property
    def counts(self) -> dict[str, int]:
        """For the run's records; empty while nothing has gone wrong."""
        counts = {"skipped_steps": self.num_skipped, "returns": self.num_returns}
        return counts if any(counts.values()) else {}

    def returned(self, ahead: SpikeState, num_samples: int) -> SpikeState:
        """The state of a checkpoint after a return to it from `ahead`. num_samples: passed over by this return."""
        return replace(
            self,
            bad_steps=(),
            num_returns=ahead.num_returns + 1,
            samples_passed_over=self.samples_passed_over + num_samples,
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """reason: why the step is bad, empty for a good one. state: after the step."""

    action: Action
    reason: str = ""
    state: SpikeState = SpikeState()


def judge_step(rules: SpikesConfig, state: SpikeState, step: int, loss: float, grad_norm: float) -> Verdict:
    """On step `step` (from 1), before its update. grad_norm: before clipping."""
    limits = (
        _above("loss", loss, state.losses[-rules.window :], rules.loss_sigma, rules),
        _above("gradient norm", grad_norm, state.grad_norms[-rules.window :], rules.grad_norm_sigma, rules),
    )
    reason = find_not_finite(loss, grad_norm) or next(filter(None, limits), None)
    recent = tuple(bad for bad in state.bad_steps if bad > step - rules.window)
    if reason is None:
        losses = _appended(state.losses, loss, rules.loss_sigma, rules.window)
        norms = _appended(state.grad_norms, grad_norm, rules.grad_norm_sigma, rules.window)
        return Verdict(action=Action.TAKE, state=replace(state, losses=losses, grad_norms=norms, bad_steps=recent))
    skipped = replace(state, bad_steps=(*recent, step), num_skipped=state.num_skipped + 1)
    if len(skipped.bad_steps) <= rules.max_skips:
        return Verdict(action=Action.SKIP, reason=reason, state=skipped)
    if state.num_returns < rules.max_returns:
        return Verdict(action=Action.RETURN, reason=reason, state=skipped)
    return Verdict(action=Action.STOP, reason=reason, state=state)


def find_not_finite(loss: float, grad_norm: float) -> str | None:
    """What is not, in words."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if math.isfinite(grad_norm) else "the gradient norm is not finite"


def _above(name: str, value: float, good: Sequence[float], sigma: float | None, rules: SpikesConfig) -> str | None:
    """In words by what `value` is bad. Until half a window is known everything is good."""
    if sigma is None or len(good) < max(2, rules.window // 2):
        return None
    mean = math.fsum(good) / len(good)
    deviation = math.sqrt(math.fsum((each - mean) * (each - mean) for each in good) / (len(good) - 1))
    limit = mean + sigma * deviation
    if value <= limit:
        return None
    return f"the {name} {value:.4g} is above {limit:.4g} (mean {mean:.4g} + {sigma:g} x {deviation:.2g} of {len(good)} steps)"


def _appended(values: tuple[float, ...], value: float, sigma: float | None, window: int) -> tuple[float, ...]:
    return () if sigma is None else (*values, value)[-window:]


# ---- what is told


@dataclass(frozen=True, kw_only=True)
class SpikeEvent:
    """What was done at the bad step `bad_step`. step, state: where the run is after it."""

    step: int
    bad_step: int
    action: str  # skipped | returned | stopped
    reason: str
    outcome: str  # in words
    state: SpikeState

    @property
    def line(self) -> str:
        return f"step {self.bad_step}: {self.reason}; {self.outcome}"


def skipped(rules: SpikesConfig, step: int, verdict: Verdict) -> SpikeEvent:
    outcome = f"skipped ({len(verdict.state.bad_steps)} of {rules.max_skips} within {rules.window} steps)"
    return SpikeEvent(
        step=step, bad_step=step, action="skipped", reason=verdict.reason, outcome=outcome, state=verdict.state
    )


def returned(rules: SpikesConfig, *, step: int, bad_step: int, reason: str, state: SpikeState) -> SpikeEvent:
    """From `bad_step` to the checkpoint of `step`."""
    outcome = f"back to step {step} (return {state.num_returns} of {rules.max_returns}), past the batches since"
    return SpikeEvent(step=step, bad_step=bad_step, action="returned", reason=reason, outcome=outcome, state=state)


def stopped(step: int, verdict: Verdict) -> SpikeEvent:
    outcome = "not taken, the run stops"
    return SpikeEvent(
        step=step, bad_step=step, action="stopped", reason=verdict.reason, outcome=outcome, state=verdict.state
    )
