"""The size that a loss needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from analysis.fits.result import FitResult
from analysis.format import Interval
from analysis.laws.law import Array, SmoothBreak
from analysis.questions.cost import Cost
from harness.errors import UserError

LARGER = 1e9
"""Multiple of the largest size of the runs up to which a size is looked for."""


@dataclass
class Need:
    """The smallest n (and its FLOPs) that is predicted to reach a loss."""

    n: float | None
    """None if no n within reason is predicted to reach the loss."""
    lo: float | None
    hi: float | None
    """Its interval: by profile where the data are at hand, else where the edges of Wald's band reach the loss. None for
    an open end."""
    every: bool
    """Whether even the smallest size that makes sense is predicted to reach the loss; `n` is that size."""
    flops: float | None
    """None without `n`, k or a cost."""
    floor: float
    """Of the law at the largest n of the data; 0 for a law without one."""
    floor_ends: Interval
    """Its interval, by profile where the data are at hand. An open lower end: a floor of zero is not excluded."""
    extrapolation: float
    """Distance of n outside the data, in units of their span of ln n."""


def need(result: FitResult, loss: float, k: float | None = None, cost: Cost | None = None) -> Need:
    """The smallest n at which the law reaches `loss` (at k, for a law in n and k), with its interval.

    Raises `UserError` if the law needs other inputs or the loss is not positive and finite.
    """
    name = result.law.scale_input
    others = {} if k is None else {"k": k}
    if set(result.law.inputs) - ({"d"} if result.converges else set()) != {name, *others}:
        raise UserError(f"{result.law.name} needs {', '.join(result.law.inputs)}; give the others (e.g. --at-k 64)")
    if not 0 < loss < math.inf:
        raise UserError(f"loss {loss} must be positive and finite")
    low, high = result.domain[name]
    sizes = np.geomspace(max(low / 1e3, k or 1.0) if name == "n" else low / 1e3, high * LARGER, 4000)
    point = {other: np.full(len(sizes), value) for other, value in others.items()}
    band = result.predict({name: sizes, **point})
    floor = float(result.floor({name: [high], **{other: [value] for other, value in others.items()}})[0])
    n = _first_below(sizes, band["value"].to_numpy(), loss)
    every = n == sizes[0]
    flops = None if n is None or cost is None or k is None else cost(n, k)
    lower, upper = (_first_below(sizes, band[edge].to_numpy(), loss) for edge in ("lo", "hi"))
    ends: Interval = (lower, upper)
    if n is not None and not every and band["lo"].notna().all():
        ends = result.size_interval({name: n, **others}) or ends
    best, worst = (end if end is None or sizes[0] <= end <= sizes[-1] else None for end in ends)
    far = 0.0 if n is None else float(result.extrapolation({name: [n], **{o: [v] for o, v in others.items()}})[0])
    floor_ends = floor_interval(result, {name: high, **others})
    return Need(n, best, worst, every, flops, floor, floor_ends, far)


def excluded(answer: Need, loss: float) -> bool:
    """Whether the data exclude that a loss can be reached: the interval of the floor is closed above it."""
    return answer.floor_ends[0] is not None and answer.floor_ends[0] > loss


def floor_interval(result: FitResult, at: Mapping[str, float]) -> Interval:
    """The interval of the floor at a point. Wald's would always be closed, since floors enter as logarithms."""
    law = result.law
    if law.floor is None or isinstance(law, SmoothBreak):
        return (None, None) if law.floor is None else result.intervals["E"]
    weights = {e.param: e.sign * math.prod(math.log(at[name]) for name in e.monomial) for e in law.terms[law.floor]}
    by_profile = result.problem is not None and result.robust is None
    _, low, high = (replace(result, ci="profile") if by_profile else result).contrast(weights)
    return (None if low is None else math.exp(low)), (None if high is None else math.exp(high))


def _first_below(x: Array, y: Array, level: float) -> float | None:
    """The smallest x at which y ≤ level, interpolated in logs; None if there is none."""
    below = np.flatnonzero(y <= level)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0 or not np.isfinite(y[i - 1]):
        return float(x[i])
    share = (math.log(y[i - 1]) - math.log(level)) / max(math.log(y[i - 1]) - math.log(y[i]), 1e-300)
    return float(np.exp(math.log(x[i - 1]) + share * (math.log(x[i]) - math.log(x[i - 1]))))
