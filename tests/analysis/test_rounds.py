"""A sweep that chases a forecast: what it trains next, on synthetic truths."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis import RunTable, fit
from analysis.fits.status import Status
from analysis.questions.rounds import Decision, Goal, Verdict, decide, half_width
from harness.errors import UserError
from tests.analysis.generate import GPT4, sae_nk

ROLES = {"n": "n_latents", "k": "k", "loss": "fvu"}
N, K = 2.0 ** np.arange(9, 18), np.array([8.0, 16.0, 32.0, 64.0])
FIRST = [(n, k) for n in N[:5] for k in K[:3]]
GOAL = Goal(2.0**17, 64.0, 0.03)
NOISE = 0.01


def cost(n, k):
    return 1e6 * (6 * 768 * n + 8 * 768 * k)


PLENTY = 200 * cost(2.0**17, 64.0)


def runs(cells, rng, truth):
    n, k = np.array(cells, dtype=float).T
    return pd.DataFrame(
        {"n_latents": n, "k": k, "fvu": sae_nk(n, k, truth) * np.exp(NOISE * rng.standard_normal(len(n)))}
    )


def fitted(frame):
    return fit(RunTable(frame, dict(ROLES)), starts=16, ci="wald", weights="none")


def spent(frame):
    return sum(cost(n, k) for n, k in zip(frame["n_latents"], frame["k"], strict=True))


def drawn(seed):
    rng = np.random.default_rng(seed)
    truth = {name: value * rng.uniform(0.85, 1.15) for name, value in GPT4.items()}
    return rng, truth, runs(FIRST, rng, truth)


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


def chased(seed):
    """(verdict, FLOPs, whether the forecast holds the truth, share of runs inside their predicted intervals)."""
    rng, truth, frame = drawn(seed)
    inside, usable = [], False
    for _ in range(30):
        result = fitted(frame)
        decision = decide(result, GOAL, cost, spent(frame), PLENTY, list(N), list(K), patient=usable)
        usable = result.status in ("ok", "open")
        if decision.verdict is not Verdict.TRAIN:
            break
        assert decision.cells is not None
        cells = [(n, k) for n, k, seeds in decision.cells[["n", "k", "seeds"]].to_numpy() for _ in range(int(seeds))]
        more = runs(cells, rng, truth)
        band = result.predict({"n": more["n_latents"], "k": more["k"]}, "new_run")
        inside += list((band["lo"].to_numpy() <= more["fvu"]) & (more["fvu"] <= band["hi"].to_numpy()))
        frame = pd.concat([frame, more], ignore_index=True)
    true = sae_nk(GOAL.n, GOAL.k, truth)
    holds = decision.forecast is not None and decision.forecast[1] <= true <= decision.forecast[2]
    return decision.verdict, spent(frame), holds, inside


def even_grid(seed):
    """FLOPs at which an even grid of the same cells, smallest first, again and again, reaches the goal."""
    rng, truth, frame = drawn(seed)
    order = sorted(((n, k) for n in N for k in K), key=lambda cell: cost(*cell))
    for _ in range(8):
        for cell in order:
            frame = pd.concat([frame, runs([cell], rng, truth)], ignore_index=True)
            if frame["n_latents"].max() < GOAL.n / 8 or cell[0] < GOAL.n / 8:
                continue
            result = fitted(frame)
            band = result.predict({"n": np.array([GOAL.n]), "k": np.array([GOAL.k])}).iloc[0]
            usable = result.status in ("ok", "open")
            if usable and half_width((band["value"], band["lo"], band["hi"])) <= GOAL.within:
                return spent(frame)
    return spent(frame)


@pytest.mark.slow
def test_a_chase_is_cheaper_than_an_even_grid_and_its_intervals_hold():
    outcomes = [chased(seed) for seed in range(20)]
    reached = [seed for seed, (verdict, *_) in enumerate(outcomes) if verdict is Verdict.REACHED]
    ratios = [even_grid(seed) / outcomes[seed][1] for seed in reached]
    inside = [flag for *_, flags in outcomes for flag in flags]
    holds = [outcomes[seed][2] for seed in reached]
    print(
        f"{len(reached)} of 20 reached; even grid / chase median {np.median(ratios):.2f}; "
        f"{np.mean(inside):.3f} of {len(inside)} runs inside; {np.mean(holds):.2f} of forecasts hold the truth"
    )
    assert len(reached) >= 17
    assert np.median(ratios) >= 2
    assert np.mean(inside) >= 0.9 and np.mean(holds) >= 0.85
