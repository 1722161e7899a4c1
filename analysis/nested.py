"""Is the larger form worth its parameters? AICc on one residual scale, and a hold-out that extrapolates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.law import Array, Law
from analysis.laws import get
from analysis.problem import Problem, pose, starting_points
from analysis.solve import Optimum, minimise

STARTS = 16


def aicc(rss: float, points: int, params: int) -> float:
    """Akaike's criterion for least squares, corrected for small samples; the variance counts as a parameter."""
    size = params + 1
    if points - size - 1 <= 0 or rss <= 0:
        return float("inf")
    return points * math.log(rss / points) + 2 * size + 2 * size * (size + 1) / (points - size - 1)


def holdout_error(
    law: Law, inputs: Mapping[str, Array], y: Array, weights: Array | None, along: str, top: int = 1, seed: int = 0
) -> float | None:
    """Root-mean-square of ln(observed / predicted) at the `top` largest values of `along`, fitted without them.

    None when too little is left to fit.
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
    """The same hold-out predicted by continuing the last log-log slope of each series: the forecast to beat."""
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
    """One entry for `law` and each nested form: params, rss_log, aicc, delta_aicc, holdout (rms of ln error)."""
    rows: list[dict[str, Any]] = []
    for form in (law, *(get(name) for name in law.nested)):
        if form is law:
            rss = float(np.sum(problem.residual(optimum.theta) ** 2))
        else:
            simpler = pose(form, {name: inputs[name] for name in form.inputs}, y, weights, problem.space)
            rss = minimise(simpler, starting_points(simpler, STARTS, 0)).objective
        held = holdout_error(form, {name: inputs[name] for name in form.inputs}, y, weights, form.scale_input)
        rows.append(
            {
                "law": form.name,
                "params": len(form.params),
                "rss_log": rss,
                "aicc": aicc(rss, len(y), len(form.params)),
                "holdout": held,
            }
        )
    best = min(row["aicc"] for row in rows)
    for row in rows:
        row["delta_aicc"] = row["aicc"] - best if math.isfinite(best) else float("nan")
    rows.append({"law": "same last slope", "holdout": last_slope_error(inputs, y, law.scale_input)})
    return rows
