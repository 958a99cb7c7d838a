"""What is done about a step that goes wrong: verdicts, and the state that they leave."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from lime_dist.config import SpikesConfig
from lime_dist.training.spikes import Action, SpikeState, Verdict, judge_step, returned, skipped, stopped

NO_SPIKES = SpikeState()
TAKE, SKIP, RETURN, STOP = Action.TAKE, Action.SKIP, Action.RETURN, Action.STOP
RULES = SpikesConfig(loss_sigma=3.0, grad_norm_sigma=4.0, window=4, max_skips=2, max_returns=1)


def judge_all(
    rules: SpikesConfig, numbers: Iterable[tuple[float, float]], state: SpikeState = NO_SPIKES, first: int = 1
) -> list[Verdict]:
    """Of consecutive steps from `first`, each (loss, gradient norm)."""
    verdicts = []
    for step, (loss, grad_norm) in enumerate(numbers, first):
        verdicts.append(judge_step(rules, state, step, loss, grad_norm))
        state = verdicts[-1].state
    return verdicts


def actions(verdicts: list[Verdict]) -> list[Action]:
    return [verdict.action for verdict in verdicts]


GOOD = [(2.0, 1.0), (2.2, 1.2), (1.8, 0.8), (2.0, 1.0)]


@pytest.mark.parametrize("bad, said", [
    ((math.nan, 1.0), "the loss is nan"),
    ((math.inf, 1.0), "the loss is inf"),
    ((2.0, math.nan), "the gradient norm is not finite"),
    ((2.0, math.inf), "the gradient norm is not finite"),
])  # fmt: skip
def test_without_rules_what_is_not_finite_stops_and_nothing_else_does(bad: tuple[float, float], said: str) -> None:
    verdicts = judge_all(SpikesConfig(), [*GOOD, (1e9, 1e9), bad])
    assert actions(verdicts) == [TAKE] * 5 + [STOP]
    assert verdicts[-1].reason == said and verdicts[-1].state == SpikeState()


def test_a_spike_is_so_many_deviations_over_the_mean_of_the_window() -> None:
    """Of 2.0, 2.2, 1.8, 2.0 the mean is 2 and the deviation sqrt(0.08 / 3), so that 3 of them end at 2.4899."""
    state = judge_all(RULES, GOOD)[-1].state
    assert state.losses == (2.0, 2.2, 1.8, 2.0) and state.grad_norms == (1.0, 1.2, 0.8, 1.0)
    assert judge_step(RULES, state, 5, 2.4898, 1.0).action is TAKE
    verdict = judge_step(RULES, state, 5, 2.4900, 1.0)
    assert verdict.action is SKIP
    assert verdict.reason == "the loss 2.49 is above 2.49 (mean 2 + 3 x 0.16 of 4 steps)"
    assert judge_step(RULES, state, 5, 2.0, 1.6531).action is TAKE
    assert judge_step(RULES, state, 5, 2.0, 1.6533).reason.startswith(
        "the gradient norm 1.653 is above 1.653 (mean 1 + 4"
    )
    assert judge_step(RULES, state, 5, -9.0, 0.0).action is TAKE, "one-sided"


def test_each_rule_alone() -> None:
    spike = [*GOOD, (9.0, 1.0), (2.0, 9.0)]
    only_loss = SpikesConfig(loss_sigma=3.0, window=4, max_skips=1)
    only_norm = SpikesConfig(grad_norm_sigma=3.0, window=4, max_skips=1)
    assert actions(judge_all(only_loss, spike)) == [TAKE] * 4 + [SKIP, TAKE]
    assert actions(judge_all(only_norm, spike)) == [TAKE] * 5 + [SKIP]
    assert judge_all(only_loss, spike)[-1].state.grad_norms == (), "what no rule asks for is not kept"


def test_before_half_a_window_all_that_is_finite_is_good() -> None:
    assert actions(judge_all(RULES, [(2.0, 1.0), (99.0, 1.0)])) == [TAKE, TAKE]
    assert actions(judge_all(RULES, [(2.0, 1.0), (2.1, 1.0), (99.0, 1.0)])) == [TAKE, TAKE, SKIP]


def test_bad_steps_do_not_enter_the_window() -> None:
    verdicts = judge_all(RULES, [*GOOD, (9.0, 9.0), (math.nan, math.nan)])
    assert actions(verdicts)[4:] == [SKIP, SKIP]
    assert verdicts[-1].state.losses == verdicts[3].state.losses
    assert (verdicts[-1].state.bad_steps, verdicts[-1].state.num_skipped) == ((5, 6), 2)


def test_the_window_moves() -> None:
    verdicts = judge_all(RULES, [*GOOD, (2.1, 1.1)])
    assert verdicts[-1].state.losses == (2.2, 1.8, 2.0, 2.1)


def test_one_bad_step_too_many_goes_back_and_after_the_last_return_stops() -> None:
    bad = (math.nan, 1.0)
    verdicts = judge_all(RULES, [*GOOD, bad, bad, bad])
    assert actions(verdicts)[4:] == [SKIP, SKIP, RETURN]
    checkpoint = verdicts[3].state
    state = checkpoint.returned(verdicts[-1].state, num_samples=36)
    assert (state.num_returns, state.num_skipped, state.bad_steps, state.samples_passed_over) == (1, 0, (), 36)
    assert state.losses == checkpoint.losses
    again = judge_all(RULES, [bad, bad, bad], state, first=5)
    assert actions(again) == [SKIP, SKIP, STOP]
    assert again[-1].state == again[-2].state, "nothing was done"


def test_passed_over_batches_add_up() -> None:
    first = SpikeState(samples_passed_over=12, num_returns=1)
    assert first.returned(SpikeState(num_returns=1, num_skipped=3), 24).samples_passed_over == 36
    assert first.returned(SpikeState(num_returns=4), 24).num_returns == 5, "of the run, not of the checkpoint"


def test_skips_are_forgotten_after_a_window() -> None:
    """Bad steps 5 and 6 count until step 9, in whose window of 4 steps (6 to 9) one of them is left."""
    bad, good = (math.nan, 1.0), (2.0, 1.0)
    verdicts = judge_all(RULES, [*GOOD, bad, bad, good, good, bad])
    assert actions(verdicts)[4:] == [SKIP, SKIP, TAKE, TAKE, SKIP]
    assert verdicts[-1].state.bad_steps == (6, 9) and verdicts[-1].state.num_skipped == 3
    assert judge_all(RULES, [*GOOD, bad, bad, good, bad])[-1].action is RETURN


def test_the_same_state_gives_the_same_verdicts() -> None:
    """Resumed anywhere, a run judges as the one that went on."""
    numbers = [(2.0 + math.sin(step) / 7 + 5 * (step % 9 == 8), 1.0 + math.cos(step) / 9) for step in range(30)]
    whole = judge_all(RULES, numbers)
    assert {SKIP, TAKE} <= set(actions(whole))
    for cut in range(1, 30):
        assert judge_all(RULES, numbers[cut:], whole[cut - 1].state, first=cut + 1) == whole[cut:]


def test_equal_losses_have_no_deviation() -> None:
    assert actions(judge_all(RULES, [(2.0, 1.0)] * 4 + [(2.0, 1.0), (2.0000001, 1.0)])) == [TAKE] * 5 + [SKIP]


def test_a_smaller_window_after_a_resume_keeps_the_newest() -> None:
    state = SpikeState(losses=tuple(map(float, range(9))))
    assert judge_step(SpikesConfig(loss_sigma=9.0, window=3), state, 10, 5.0, 1.0).state.losses == (7.0, 8.0, 5.0)


def test_what_is_told() -> None:
    verdict = judge_all(RULES, [*GOOD, (math.nan, 1.0)])[-1]
    assert skipped(RULES, 5, verdict).line == "step 5: the loss is nan; skipped (1 of 2 within 4 steps)"
    assert stopped(5, verdict).line == "step 5: the loss is nan; not taken, the run stops"
    state = SpikeState().returned(verdict.state, 12)
    event = returned(RULES, step=3, bad_step=7, reason=verdict.reason, state=state)
    assert event.line == "step 7: the loss is nan; back to step 3 (return 1 of 1), past the batches since"
    assert (event.step, event.state.counts) == (3, {"skipped_steps": 0, "returns": 1})
    assert SpikeState().counts == {}
