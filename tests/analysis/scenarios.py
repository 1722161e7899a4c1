"""Studies with a hidden fault, drawn many times: how often do intervals hold the truth, how many fits say nothing?

`python -m tests.analysis.scenarios --replicates 300` prints the table of docs/analysis.md. Replicate i has seed i.
A fit is silent if its status is `ok` and it has no note of severity warning or error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis import RunTable, fit
from analysis.laws.catalogue import get
from analysis.questions.multiplier import multiplier
from analysis.questions.need import need
from tests.analysis.generate import MINILM_LIKE, sae_nk

WIDTHS, KS = 2.0 ** np.arange(8, 14), np.array([8.0, 16.0, 32.0])
NOISE = 0.005
NO_FLOOR = MINILM_LIKE | {"zeta": -40.0}
LAW = replace(get("sae_nk"), nested=())
"""Without the comparison with nested forms, which takes most of the time of a fit."""
TARGET = {"n": 2 * WIDTHS[-1], "k": 16.0}
"""The forecast whose interval should hold the law without the fault."""

Outcome = tuple[bool, bool]
"""(covered, silent)"""


@dataclass(frozen=True)
class Scenario:
    """A kind of study: `draw` makes one of a generator and judges what is said about it."""

    draw: Callable[[np.random.Generator], Outcome]
    quantity: str
    """What the interval is of."""


def _frame(widths=WIDTHS, ks=KS, truth=MINILM_LIKE, repeats=1) -> pd.DataFrame:
    cells = pd.MultiIndex.from_product([widths, ks, range(repeats)], names=["n_latents", "k", "seed"])
    frame = cells.to_frame(index=False)
    clean = sae_nk(frame["n_latents"].to_numpy(), frame["k"].to_numpy(), truth)
    return frame.assign(fvu=clean, **{"stream.seed": np.arange(len(frame)) % 2}, store_id="s", converged=True)


def _table(frame: pd.DataFrame, rng: np.random.Generator, noise=NOISE, **roles: str) -> RunTable:
    frame = frame.assign(
        fvu=frame["fvu"] * np.exp(noise * rng.standard_normal(len(frame))), run=[f"r{i}" for i in range(len(frame))]
    )
    return RunTable(frame, {"n": "n_latents", "k": "k", "loss": "fvu", "run": "run", "converged": "converged", **roles})


def _silent(result) -> bool:
    return result.status == "ok" and all(entry.severity == "info" for entry in result.notes)


def _forecast(table: RunTable, truth=MINILM_LIKE) -> Outcome:
    result = fit(table, LAW, starts=8)
    if result.status == "failed":
        return True, False
    band = result.predict({name: [value] for name, value in TARGET.items()})
    true = float(sae_nk(TARGET["n"], TARGET["k"], truth))
    return bool(band["lo"][0] <= true <= band["hi"][0]), _silent(result)


def _slope(table: RunTable, truth, law="sae_nk_no_floor") -> Outcome:
    result = fit(table, law, starts=8)
    low, high = result.intervals["gamma"]
    return (low or -np.inf) <= truth["gamma"] <= (high or np.inf), _silent(result)


def _sound(rng):
    return _forecast(_table(_frame(), rng))


BUDGET = 1e6


def token_study(rng: np.random.Generator, truth=NO_FLOOR) -> RunTable:
    """Six widths and three k at a fixed budget, with curves: L(n, k) plus a term that falls as D^−0.4.

    The noise of a run is common to its curve; each of its points adds a tenth of it.
    """
    frame = _frame(truth=truth).assign(converged=False, tokens=BUDGET)
    n, k, clean = (frame[name].to_numpy() for name in ("n_latents", "k", "fvu"))
    tokens = BUDGET * 2.0 ** -np.arange(4.0, -0.5, -0.5)
    middle = sae_nk(WIDTHS[[0, -1]], np.array([16.0, 16.0]), truth) * np.array([0.05, 0.14]) / np.array([0.95, 0.86])
    slope = np.log(middle[1] / middle[0]) / np.log(WIDTHS[-1] / WIDTHS[0])
    term = middle[0] * (n / WIDTHS[0]) ** slope * (k / 16.0) ** -0.3
    losses = clean[:, None] + term[:, None] * (tokens / BUDGET) ** -0.4
    losses *= np.exp(NOISE * rng.standard_normal((len(n), 1)) + NOISE / 10 * rng.standard_normal(losses.shape))
    table = _table(frame.assign(fvu=losses[:, -1]), rng, noise=0.0, d="tokens")
    curves = [pd.DataFrame({"tokens": tokens, "fvu": loss}) for loss in losses]
    table.histories = {f"r{i}": (lambda curve=curve: curve) for i, curve in enumerate(curves)}
    return table


def _false_floor(rng):
    result = fit(token_study(rng), LAW, starts=8)
    return result.intervals["zeta"][0] is None, _silent(result)


def _rate(rng):
    frame = _frame().assign(lr=lambda f: f["n_latents"] ** -0.5)
    u = np.log(frame["n_latents"] / WIDTHS[0]) / np.log(WIDTHS[-1] / WIDTHS[0])
    frame["fvu"] *= 1 + 0.05 * u**2
    return _forecast(_table(frame, rng, lr="lr"))


def _shared(rng, by: str, size: float = 0.01):
    frame = _frame().assign(**{"stream.seed": 0})
    values = frame[by].unique()
    common = dict(zip(values, np.exp(size * rng.standard_normal(len(values))), strict=True))
    frame["fvu"] = frame["fvu"] * frame[by].map(common).astype(float)
    return _forecast(_table(frame, rng))


def _largest_off(rng):
    frame = _frame()
    frame["fvu"] = frame["fvu"].where(frame.index < len(frame) - 1, 1.05 * frame["fvu"])
    return _forecast(_table(frame, rng))


def _edge_off(rng):
    frame = _frame()
    frame.loc[frame["n_latents"] == WIDTHS[0], "fvu"] *= 1.1
    return _forecast(_table(frame, rng))


def _scatter(rng):
    return _forecast(_table(_frame(), rng, noise=0.12))


def _three_widths(rng):
    return _forecast(_table(_frame(widths=WIDTHS[::2]), rng))


def _copies(rng):
    """Six names for each run at three widths: the values are equal but for the last digit."""
    table = _table(_frame(truth=NO_FLOOR), rng)
    again = table.frame[table.frame["n_latents"].isin([WIDTHS[0], WIDTHS[2], WIDTHS[-1]])]
    parts = [
        table.frame,
        *(again.assign(fvu=again["fvu"] * (1 + 1e-15 * s * rng.random(len(again))), seed=s) for s in range(1, 6)),
    ]
    frame = pd.concat(parts, ignore_index=True)
    return _slope(RunTable(frame.assign(run=[f"r{i}" for i in range(len(frame))]), table.roles), NO_FLOOR)


def _experts(rng):
    frame = _frame(repeats=2).assign(experts=lambda f: 1 + 7 * f["seed"], seed=0)
    frame["fvu"] *= np.where(frame["experts"] > 1, 1.04, 1.0)
    return _forecast(_table(frame, rng, experts="experts"))


def _ask(rng):
    """No floor: "not reachable" is false. The question is a loss that 10,000 times the largest n would reach."""
    table = _table(_frame(truth=NO_FLOOR), rng, noise=0.01)
    result = fit(table, LAW, starts=8)
    wanted = float(sae_nk(1e4 * WIDTHS[-1], 16.0, NO_FLOOR))
    answer = need(result, wanted, k=16.0)
    ends = getattr(answer, "floor_ends", None)
    unreachable = (
        answer.n is None and answer.floor >= wanted if ends is None else ends[0] is not None and ends[0] > wanted
    )
    return not unreachable, _silent(result)


def two_floors(rng: np.random.Generator, floors=(0.05, 0.08), sizes=8) -> tuple[RunTable, float, float]:
    """(table, loss, true multiplier) of two architectures with these floors and one exponent."""
    c = np.geomspace(1e12, 2e14, sizes)
    curves = [floors[0] + 0.3 * (c / 1e12) ** -0.3, floors[1] + 0.4 * (c / 1e12) ** -0.3]
    loss = np.concatenate(curves) * np.exp(NOISE * rng.standard_normal(2 * sizes))
    frame = pd.DataFrame({"flops": np.r_[c, c], "fvu": loss, "sae": ["topk"] * sizes + ["switch"] * sizes, "k": 32})
    at = 0.16
    needed = [((at - floor) / size) ** (-1 / 0.3) for floor, size in zip(floors, (0.3, 0.4), strict=True)]
    return RunTable(frame, {"flops": "flops", "loss": "fvu", "k": "k"}), at, needed[0] / needed[1]


def _floors(rng):
    table, at, truth = two_floors(rng)
    result = multiplier(table, at_loss=at)
    said = any(entry.severity != "info" for entry in result.notes) or getattr(result, "p_floor", 1.0) < 0.1
    return (result.lo or 0.0) <= truth <= (result.hi or np.inf), not said


SCENARIOS = {
    "nothing wrong": Scenario(_sound, "forecast at 2 n"),
    "fixed tokens, no floor, token term 5–14 %": Scenario(_false_floor, "the floor (0)"),
    "learning rate worse by 5 % at the largest n": Scenario(_rate, "forecast at 2 n"),
    "1 % noise shared by a width": Scenario(lambda rng: _shared(rng, "n_latents"), "forecast at 2 n"),
    "1 % noise shared by a sparsity": Scenario(lambda rng: _shared(rng, "k"), "forecast at 2 n"),
    "1 % noise shared by the store": Scenario(lambda rng: _shared(rng, "store_id"), "forecast at 2 n"),
    "largest cell off by 5 %": Scenario(_largest_off, "forecast at 2 n"),
    "smallest n off by 10 %": Scenario(_edge_off, "forecast at 2 n"),
    "scatter of 12 %": Scenario(_scatter, "forecast at 2 n"),
    "three widths and a floor": Scenario(_three_widths, "forecast at 2 n"),
    "six names for one run at three widths": Scenario(_copies, "gamma"),
    "1 and 8 experts as repeats, 4 % apart": Scenario(_experts, "forecast at 2 n"),
    "`ask` without a floor, 1 % noise": Scenario(_ask, "not called unreachable"),
    "two architectures, floors .05 and .08": Scenario(_floors, "multiplier at a loss"),
}


def measure(name: str, replicates: int) -> tuple[float, float]:
    """(coverage, share of silent `ok` fits) of a scenario."""
    outcomes = [SCENARIOS[name].draw(np.random.default_rng(seed)) for seed in range(replicates)]
    covered, silent = np.mean(np.array(outcomes, dtype=float), axis=0)
    return float(covered), float(silent)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=300)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    for title, scenario in SCENARIOS.items():
        if arguments.only in title:
            shares = measure(title, arguments.replicates)
            print(
                f"| {title} | {scenario.quantity} | " + " | ".join(f"{100 * s:.1f} %" for s in shares) + " |",
                flush=True,
            )
