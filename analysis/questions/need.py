"""The size that a loss needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.fits.result import FitResult
from analysis.laws.law import Array
from analysis.questions.cost import Cost
from harness.errors import UserError


@dataclass
class Need:
    """The smallest n (and its FLOPs) that is predicted to reach a loss."""

    n: float | None
    """None if no n within reason is predicted to reach the loss."""
    lo: float | None
    hi: float | None
    """Where the edges of the band reach the loss; None if they do not."""
    flops: float | None
    """None without `n`, k or a cost."""
    floor: float
    """Of the law at the largest n of the data."""
    extrapolation: float
    """Distance of n outside the data, in units of their span of ln n."""


def need(result: FitResult, loss: float, k: float | None = None, cost: Cost | None = None) -> Need:
    """The smallest n at which the law and the edges of its band reach `loss` (at k, for a law in n and k).

    Raises `UserError` if the law needs other inputs or the loss is not positive and finite.
    """
    name = result.law.scale_input
    others = {} if k is None else {"k": k}
    if set(result.law.inputs) != {name, *others}:
        raise UserError(f"{result.law.name} needs {', '.join(result.law.inputs)}; give the others (e.g. --at-k 64)")
    if not 0 < loss < math.inf:
        raise UserError(f"loss {loss} must be positive and finite")
    low, high = result.domain[name]
    sizes = np.geomspace(low / 1e3, high * 1e9, 4000)
    band = result.predict({name: sizes, **{other: np.full(len(sizes), value) for other, value in others.items()}})
    floor = float(result.floor({name: [high], **{other: [value] for other, value in others.items()}})[0])
    n = _first_below(sizes, band["value"].to_numpy(), loss)
    flops = None if n is None or cost is None or k is None else cost(n, k)
    best, worst = (_first_below(sizes, band[edge].to_numpy(), loss) for edge in ("lo", "hi"))
    far = 0.0 if n is None else float(result.extrapolation({name: [n], **{o: [v] for o, v in others.items()}})[0])
    return Need(n, best, worst, flops, floor, far)


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
