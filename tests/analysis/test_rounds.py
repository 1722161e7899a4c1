"""A sweep that chases a forecast: what it trains next, on synthetic truths."""

from dataclasses import replace

import pytest

from analysis import RunTable, fit
from analysis.fits.status import Status
from analysis.questions.rounds import Decision, Goal, Verdict, decide, half_width
from harness.errors import UserError
from tests.analysis.chases import GOAL, PLENTY, K, N, cost, drawn, fitted, spent, summary


def decided(frame, goal=GOAL, budget=PLENTY, **changes) -> Decision:
    result = replace(fitted(frame), **{name: changes.pop(name) for name in ("status", "regime") if name in changes})
    return decide(result, goal, cost, spent(frame), budget, list(N), list(K), **changes)


def test_a_goal_that_is_reached_needs_nothing():
    _, _, frame = drawn(1)
    decision = decided(frame, Goal(2.0**13, 32.0, 0.2))
    assert decision.verdict is Verdict.REACHED and decision.forecast is not None and decision.cells is None
    assert half_width(decision.forecast) <= 0.2


def test_a_round_costs_at_most_what_was_spent_and_helps():
    _, _, frame = drawn(1)
    decision = decided(frame)
    assert decision.verdict is Verdict.TRAIN and decision.forecast is not None and decision.cells is not None
    planned = decision.cells[decision.cells["n"] < GOAL.n / 8]
    assert planned["flops"].sum() <= spent(frame) * (1 + 1e-9)
    assert decision.expected is not None and decision.expected < half_width(decision.forecast)


def test_a_far_goal_gets_a_cell_near_enough():
    _, _, frame = drawn(1)
    decision = decided(frame)
    assert decision.cells is not None and decision.cells["n"].max() >= GOAL.n / 8


def test_a_far_goal_without_the_compute_for_a_near_cell_is_refused():
    _, _, frame = drawn(1)
    decision = decided(frame, budget=spent(frame) + cost(2.0**14, 8.0) * 0.9)
    assert decision.verdict is Verdict.UNREACHABLE and "8 times the largest n" in decision.reason


def test_a_goal_beyond_the_budget_says_what_it_would_need():
    _, _, frame = drawn(1)
    decision = decided(frame, budget=spent(frame) + cost(2.0**14, 8.0) * 1.1)
    assert decision.verdict is Verdict.UNREACHABLE and "would need up to" in decision.reason
    decision = decided(frame, Goal(2.0**14, 32.0, 1e-5))
    assert decision.verdict is Verdict.UNREACHABLE and "out of reach with 64 times as many" in decision.reason


def test_no_forecast_is_chased_that_the_fit_cannot_support():
    _, _, frame = drawn(1)
    assert decided(frame, regime="mixed").verdict is Verdict.UNSUPPORTED
    assert decided(frame, status=Status.UNRELIABLE).verdict is Verdict.UNSUPPORTED
    assert decided(frame, status=Status.FAILED, patient=True).verdict is Verdict.UNSUPPORTED
    easy = Goal(2.0**13, 32.0, 0.2)
    assert decided(frame, easy, status=Status.UNRELIABLE, patient=True).verdict is not Verdict.REACHED
    one_k = frame[frame["k"] == 8].rename(columns={"n_latents": "x"})
    power = fit(RunTable(one_k, {"x": "x", "loss": "fvu"}), "power", starts=16)
    with pytest.raises(UserError, match="needs a law of the two"):
        decide(power, GOAL, cost, 1.0, 2.0, list(N), list(K))


@pytest.mark.slow
def test_a_chase_is_cheaper_than_an_even_grid_and_its_intervals_hold():
    reached, ratio, inside, holds = summary(4)
    assert reached >= 2 and ratio >= 1.5 and inside >= 0.8 and holds >= 0.5
