"""Designs with known truths, and whether profile intervals cover them: for the tests and for `make bench-analysis`."""

import numpy as np
import pandas as pd

from analysis.fits.intervals import critical_f, profile_f
from analysis.fits.problem import pose, starting_points
from analysis.fits.solve import minimise
from analysis.laws.catalogue import get
from tests.analysis.generate import GPT4


def covered(law, inputs, truth, y, weights=None, level=0.95):
    """Per parameter, whether the profile interval holds the truth: F at the true value below its quantile.

    The search for the optimum starts from the truth and two starts of the grid. `fit` uses more starts and reaches the
    same (test_guarantees).
    """
    problem = pose(law, inputs, y, weights)
    matrix, offset = problem.raw_map()
    target = np.array([np.log(truth[p]) if p in law.exp_params else truth[p] for p in law.params])
    at_truth = np.asarray(np.linalg.solve(matrix, target - offset), dtype=np.float64)
    best = minimise(problem, [at_truth, *starting_points(problem, 2, 0)])
    limit = critical_f(problem.points - problem.size, level)
    start = best.theta
    hits = []
    for row, value, shift in zip(matrix, target, offset, strict=True):
        f, _ = profile_f(problem, best.theta, best.objective, row, value - shift, start)
        hits.append(f <= limit)
    return hits


def nk_grid(n, k):
    """Every pair of the given n and k, as inputs of a law."""
    rows = pd.MultiIndex.from_product([n, k]).to_frame(index=False).to_numpy(dtype=float)
    return {"n": rows[:, 0], "k": rows[:, 1]}


FLOOR = {"E": 0.12, "A": 3.0, "a": 0.4}
DESIGNS = {
    "45 cells, 1 %": ("sae_nk", nk_grid(2.0 ** np.arange(11, 20), 2.0 ** np.arange(5, 10)), GPT4, 0.01),
    "12 cells, 0.5 %": ("sae_nk", nk_grid(2.0 ** np.array([11, 13, 16, 19]), 2.0 ** np.array([5, 7, 9])), GPT4, 0.005),
    "35 cells with experts, 0.5 %": (
        "bilinear_experts",
        {"n": np.repeat(2.0 ** np.arange(9, 16), 5), "experts": np.tile(2.0 ** np.arange(5), 7)},
        {"E": 0.05, "a": -0.3, "b": 0.25, "c": -0.02, "d": 1.2},
        0.005,
    ),
    "9 sizes, 0.5 %": ("power_floor", {"x": np.geomspace(256, 65536, 9)}, FLOOR, 0.005),
}
"""Name → (law, inputs, true parameters, standard deviation of ln(loss))."""


def clean(law_name, inputs, truth):
    """Losses of a law at raw coefficients as they are reported."""
    law = get(law_name)
    raw = np.array([np.log(truth[p]) if p in law.exp_params else truth[p] for p in law.params])
    return np.exp(law.log_value(raw, law.features({name: np.log(values) for name, values in inputs.items()})))
