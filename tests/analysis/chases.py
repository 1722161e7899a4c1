"""Sweeps that chase a forecast, simulated on known truths: what they cost beside an even grid of the same cells.

`python -m tests.analysis.chases --draws 20` prints the figures of docs/lab-log.md; the tests use a few draws.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import RunTable, fit
from analysis.questions.rounds import Goal, Verdict, decide, half_width
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


class Chased(NamedTuple):
    verdict: Verdict
    flops: float
    holds: bool
    """Whether the forecast in the end holds the truth."""
    inside: list[bool]
    """Of every planned run: whether it came inside its predicted interval."""


def chased(seed: int) -> Chased:
    """One chase to its end."""
    rng, truth, frame = drawn(seed)
    inside, usable = [], False
    while True:
        result = fitted(frame)
        decision = decide(result, GOAL, cost, spent(frame), PLENTY, list(N), list(K), patient=usable)
        usable = result.status.usable
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
    return Chased(decision.verdict, spent(frame), holds, inside)


def even_grid(seed: int) -> float:
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
            usable = result.status.usable
            if usable and half_width((band["value"], band["lo"], band["hi"])) <= GOAL.within:
                return spent(frame)
    return spent(frame)


class Summary(NamedTuple):
    reached: int
    ratio: float
    """Median of the FLOPs of the even grid over those of the chase, where it reached its goal."""
    inside: float
    """Share of the planned runs inside their predicted intervals."""
    holds: float
    """Share of the forecasts that hold the truth, where the goal was reached."""


def summary(draws: int) -> Summary:
    outcomes = [chased(seed) for seed in range(draws)]
    reached = [seed for seed, outcome in enumerate(outcomes) if outcome.verdict is Verdict.REACHED]
    ratios = [even_grid(seed) / outcomes[seed].flops for seed in reached]
    inside = [flag for outcome in outcomes for flag in outcome.inside]
    holds = [outcomes[seed].holds for seed in reached]
    return Summary(len(reached), float(np.median(ratios)), float(np.mean(inside)), float(np.mean(holds)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=20)
    print(summary(parser.parse_args().draws))
