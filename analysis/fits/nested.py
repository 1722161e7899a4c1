"""Is the larger form worth its parameters? AICc on one residual scale, and a hold-out that extrapolates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.fits.problem import Problem, pose, starting_points
from analysis.fits.solve import Optimum, minimise
from analysis.laws.catalogue import get
from analysis.laws.law import Array, Law

STARTS = 16
"""Starts of the optimiser for a simpler form and for a hold-out."""


def aicc(rss: float, points: int, params: int) -> float:
    """Akaike's criterion for least squares, corrected for small samples; the variance counts as a parameter."""
    size = params + 1
    if points - size - 1 <= 0 or rss <= 0:
        return float("inf")
    return points * math.log(rss / points) + 2 * size + 2 * size * (size + 1) / (points - size - 1)


def aicc_row(law: Law, rss: float, points: int, holdout: float | None) -> dict[str, Any]:
    """One row of a comparison of laws: law, params, rss_log, aicc, holdout."""
    params = len(law.params)
    return {
        "law": law.name,
        "params": params,
        "rss_log": rss,
        "aicc": aicc(rss, points, params),
        "holdout": holdout,
    }


def add_delta_aicc(rows: list[dict[str, Any]]) -> None:
    """Add `delta_aicc` to every row: its AICc minus the lowest; NaN if the lowest is not finite."""
    best = min(row["aicc"] for row in rows)
    for row in rows:
        row["delta_aicc"] = row["aicc"] - best if math.isfinite(best) else float("nan")


def holdout_error(
    law: Law, inputs: Mapping[str, Array], y: Array, weights: Array | None, along: str, top: int = 1, seed: int = 0
) -> float | None:
    """Root-mean-square of ln(observed / predicted) at the `top` largest values of `along`, fitted without them.

    None if too little is left to fit.
    """
    levels = np.unique(inputs[along])
    if len(levels) <= top:
        return None
    out = inputs[along] >= levels[-top]
    rest = {name: values[~out] for name, values in inputs.items()}
    enough = all(len(np.unique(rest[name])) >= law.min_levels.get(name, 2) for name in law.inputs)
    if np.sum(~out) <= len(law.params) or not enough:
        return None
    problem = pose(law, rest, y[~out], None if weights is None else weights[~out])
    theta = minimise(problem, starting_points(problem, STARTS, seed)).theta
    centred = {name: np.log(inputs[name][out]) - problem.means[name] for name in law.inputs}
    predicted = law.log_value(theta, law.features(centred)) + problem.y_mean
    return float(np.sqrt(np.mean((np.log(y[out]) - predicted) ** 2)))


def last_slope_error(inputs: Mapping[str, Array], y: Array, along: str) -> float | None:
    """The error of the same hold-out if each series continues with its last log-log slope: the forecast to beat.

    None if no series has three values of `along`, the largest among them.
    """
    others = [name for name in inputs if name != along]
    keys = np.stack([inputs[name] for name in others]) if others else np.zeros((1, len(y)))
    largest = np.max(inputs[along])
    errors = []
    for key in np.unique(keys, axis=1).T:
        series = np.all(keys == key[:, None], axis=0)
        x, log_y = np.log(inputs[along][series]), np.log(y[series])
        levels = np.unique(x)
        if len(levels) < 3 or levels[-1] < math.log(largest):
            continue
        m = [float(np.mean(log_y[x == level])) for level in levels[-3:]]
        guess = m[1] + (m[1] - m[0]) / (levels[-2] - levels[-3]) * (levels[-1] - levels[-2])
        errors.extend((log_y[x == levels[-1]] - guess) ** 2)
    return float(np.sqrt(np.mean(errors))) if errors else None


def compare_nested(
    law: Law, problem: Problem, inputs: Mapping[str, Array], y: Array, weights: Array | None, optimum: Optimum
) -> list[dict[str, Any]]:
    """One row for `law` and for each nested form, as `aicc_row` with `delta_aicc`; then one for the last slope."""
    rows: list[dict[str, Any]] = []
    for form in (law, *(get(name) for name in law.nested)):
        own = {name: inputs[name] for name in form.inputs}
        if form is law:
            rss = float(np.sum(problem.residual(optimum.theta) ** 2))
        else:
            simpler = pose(form, own, y, weights)
            rss = minimise(simpler, starting_points(simpler, STARTS, 0)).objective
        rows.append(aicc_row(form, rss, len(y), holdout_error(form, own, y, weights, form.scale_input)))
    add_delta_aicc(rows)
    rows.append({"law": "same last slope", "holdout": last_slope_error(inputs, y, law.scale_input)})
    return rows
