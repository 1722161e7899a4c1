"""What a sweep that chases a forecast trains next: nothing, because it is reached or cannot be, or some further cells.

Each round fits what has ended and plans for the cheapest budget that is predicted to reach the goal. It spends at most
what all earlier rounds have: a poor first fit then misleads half of the compute at most.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.format import number
from analysis.questions.cost import Cost
from analysis.questions.plan import Plan, plan, plausible_truths
from analysis.questions.reach import FAR, is_far
from harness.errors import UserError

HALVINGS = 8
"""Steps of the search for the cheapest budget: it is found to 1/256 of what is left, in logarithms."""

LARGER_BUDGETS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Multiples of what is left that are tried, to say what a goal out of reach would need."""

MARGIN = 1.5
"""A goal counts as out of reach if all that is left is predicted to give an interval this many times as wide."""


AIM = 0.85
"""Share of the goal's width that a round plans for: a plan that only just suffices is missed half of the time."""


class Verdict(enum.StrEnum):
    REACHED = "reached"
    TRAIN = "train"
    """The cells of the decision come next."""
    UNREACHABLE = "unreachable"
    UNSUPPORTED = "unsupported"
    """The fit is not one that a forecast can be read from."""


@dataclass(frozen=True)
class Goal:
    """A forecast at (n, k) whose interval is at most ± `within` (a fraction) wide."""

    n: float
    k: float
    within: float

    @property
    def point(self) -> dict[str, float]:
        return {"n": self.n, "k": self.k}

    def __str__(self) -> str:
        return f"forecast n={self.n:g} k={self.k:g} within {100 * self.within:g}%"


@dataclass(frozen=True)
class Decision:
    verdict: Verdict
    reason: str
    """In words, for people."""
    forecast: tuple[float, float, float] | None = None
    """(value, lo, hi) of the law at the goal now; None without a usable fit."""
    expected: float | None = None
    """Half the width of ln(forecast) that is predicted after the cells."""
    cells: pd.DataFrame | None = None
    """n, k, seeds (number of repeats), flops (of all repeats)."""


def half_width(forecast: tuple[float, float, float]) -> float:
    """Half the width of an interval in logarithms, about its relative half width; inf if it is open."""
    _, low, high = forecast
    return 0.5 * math.log(high / low) if low > 0 and math.isfinite(high) else math.inf


def decide(
    result: FitResult,
    goal: Goal,
    cost: Cost,
    spent: float,
    budget: float,
    n: Sequence[float],
    k: Sequence[float],
    patient: bool = False,
) -> Decision:
    """What comes next after the runs behind `result`.

    Args:
        patient: Whether an unreliable fit gets one more round, because that before was usable: of the many fits of a
            long chase some look wrong by chance.
        cost: (n, k) → FLOPs of one run.
        spent: FLOPs of all runs so far; `budget`: of all runs in the end.
        n, k: Sizes that further cells may have.

    The costs are nominal FLOPs, as `Cost` has them. Raises `UserError` if the law is not one of n and k.
    """
    if set(result.law.inputs) != {"n", "k"}:
        raise UserError(f"a forecast at n and k needs a law of the two, such as sae_nk; this one is {result.law.name}")
    usable = result.status.usable
    if not usable and not (patient and result.status is Status.UNRELIABLE):
        errors = "; ".join(str(entry) for entry in result.notes if entry.severity == "error")
        return Decision(Verdict.UNSUPPORTED, f"the fit has status {result.status.value}: {errors}")
    if result.regime == "mixed":
        return Decision(Verdict.UNSUPPORTED, "some runs are converged and some are not, so one law cannot hold for all")
    band = result.forecast({name: np.array([size]) for name, size in goal.point.items()}).iloc[0]
    now = (float(band["value"]), float(band["lo"]), float(band["hi"]))
    width, far = half_width(now), is_far(result, goal.n)
    if width <= goal.within and usable and not far:
        return Decision(Verdict.REACHED, f"the goal was ± {100 * goal.within:g} %", now)
    left = budget - spent
    nearest = min((size for size in n if size * FAR * (1 + 1e-9) >= goal.n), default=None)
    if far and (nearest is None or cost(nearest, min(k)) > left):
        needed = "" if nearest is None else f", which costs {number(cost(nearest, min(k)))} FLOPs"
        reason = (
            f"the goal is more than {FAR:g} times the largest n of the runs, too far to believe a forecast; it needs a "
            f"cell of n ≥ {goal.n / FAR:g}{needed}, and {number(left)} FLOPs are left"
        )
        return Decision(Verdict.UNREACHABLE, reason, now)
    try:
        return _further(result, goal, cost, spent, left, n, k, now, nearest if far else None)
    except UserError as error:  # no candidate is affordable
        return Decision(Verdict.UNREACHABLE, str(error), now)


def _further(
    result: FitResult,
    goal: Goal,
    cost: Cost,
    spent: float,
    left: float,
    n: Sequence[float],
    k: Sequence[float],
    now: tuple[float, float, float],
    nearest: float | None,
) -> Decision:
    """The cells of the next round, or that no budget that is left is predicted to reach the goal."""

    truths = plausible_truths(result)

    def planned(budget: float) -> Plan:
        return plan(result, goal.point, budget, cost, n, k, cap=budget, truths=truths)

    everything = planned(left)
    if half_width(everything.after) > goal.within * MARGIN:
        reason = (
            f"± {number(100 * half_width(now))} % now, and the {number(left)} FLOPs that are left are predicted to "
        )
        reason += f"give ± {number(100 * half_width(everything.after))} %; {_missing(planned, goal, left)}"
        return Decision(Verdict.UNREACHABLE, reason, now)
    cheapest = min(cost(a, b) for a in n for b in k if b <= a)
    low, high = cheapest, left
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        if half_width(planned(middle).after) <= AIM * goal.within:
            high = middle
        else:
            low = middle
    chosen = planned(min(high, max(spent, cheapest)))
    cells = chosen.cells
    if nearest is not None and cells["n"].max() < nearest:
        b = min(k)
        cells = pd.concat([cells, pd.DataFrame([{"n": nearest, "k": b, "seeds": 1, "flops": cost(nearest, b)}])])
        cells = cells.reset_index(drop=True)
    return Decision(Verdict.TRAIN, "", now, half_width(chosen.after), cells)


def _missing(planned, goal: Goal, left: float) -> str:
    """What a goal out of reach would need."""
    for multiple in LARGER_BUDGETS:
        if half_width(planned(multiple * left).after) <= goal.within:
            return f"± {100 * goal.within:g} % would need up to {number(multiple * left)} FLOPs"
    return f"± {100 * goal.within:g} % is out of reach with {LARGER_BUDGETS[-1]:g} times as many"
