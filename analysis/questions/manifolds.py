"""Do further latents find further features, or tile the manifolds of frequent ones? (arXiv 2509.02565)

Feature i has frequency ∝ i^−(1+α), and s latents leave ∝ s^−β of its error. If the n latents are shared out best:

* β > α: they find n^1 features, and the loss falls as n^−α;
* β < α: they find n^((1+β)/(1+α)) features, since the frequent ones never have enough, and the loss falls as n^−β.

So the loss alone cannot tell the regimes apart, and the number of features with a latent can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from analysis.format import Interval
from analysis.questions.layers import LEAST_SIZES, falling
from analysis.runs.table import RunTable
from harness.errors import UserError

FOUND = "recovered"
"""Share of the true features that have a latent: a column of runs on synthetic activations."""
BORDER = 0.8
"""Between the exponents of the features found in both regimes: with finitely many features 1 becomes a little less."""
SATURATED = 0.9
"""Runs that recover more are left out: there is nothing left to find."""


@dataclass(frozen=True)
class Regime:
    """Exponents in n of the features with a latent, and of the loss, of one sort of runs."""

    cell: str
    sizes: int
    found: float
    found_interval: Interval
    loss: float
    """fvu ∝ n^−loss."""
    loss_interval: Interval

    @property
    def tiles(self) -> bool | None:
        """Whether latents tile manifolds: features grow more slowly than n. None if the interval holds `BORDER`."""
        low, high = self.found_interval
        if low is None or high is None or low < BORDER < high:
            return None
        return high <= BORDER


def regimes(table: RunTable) -> list[Regime]:
    """One entry per kind of activations, architecture and k with at least `LEAST_SIZES` sizes that are not saturated.
    Raises `UserError` if there is none."""
    if FOUND not in table.frame:
        raise UserError(f"{table.name}: no run has {FOUND}; the runs need activations=synthetic")
    frame = table.frame[(table.frame[FOUND] > 0) & (table.frame[FOUND] <= SATURATED)]
    prefix = "activations.synthetic."
    keys = [name for name in frame if str(name).startswith(prefix) and frame[name].astype(str).nunique() > 1]
    keys = [*keys, *(name for name in ("sae", table.roles.get("k", "")) if name in frame)]
    texts = frame.assign(**{str(key): frame[key].astype(str) for key in keys})
    found = []
    for key, part in texts.groupby(keys, sort=True):
        values = zip(keys, cast("tuple[Any, ...]", key), strict=True)
        n = np.log(part[table.roles["n"]].to_numpy(dtype=float))
        if len(set(n)) < LEAST_SIZES:
            continue
        features, ends = falling(n, -np.log(part[FOUND].to_numpy(dtype=float)))
        loss, loss_ends = falling(n, np.log(part[table.roles["loss"]].to_numpy(dtype=float)))
        cell = ", ".join(f"{str(name).removeprefix(prefix)}={value}" for name, value in values)
        found.append(Regime(cell, len(set(n)), features, ends, loss, loss_ends))
    if not found:
        raise UserError(
            f"{table.name}: no cell has {LEAST_SIZES} sizes n that recover something and at most {SATURATED:.0%}"
        )
    return found


def expected(alpha: float, beta: float) -> tuple[float, float]:
    """(exponent of the features found, exponent of the loss) of the best allocation."""
    return min(1.0, (1 + beta) / (1 + alpha)), min(alpha, beta)
