"""One least-squares problem (a law, centred data, weights), and starting points for its optimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from scipy.optimize import nnls

from analysis.laws.catalogue import get
from analysis.laws.law import Array, Law, SmoothBreak

FLOOR_SHARES = (0.03, 0.1, 0.25, 0.45, 0.65, 0.8, 0.92, 0.98)
FLOOR_SLOPES = (-1.2, -0.7, -0.35, -0.1, 0.0, 0.25)
DECAYS = (0.08, 0.17, 0.3, 0.5, 0.8, 1.3)
TOKEN_SHARES = (0.03, 0.1, 0.25)
TOKENS_AT_END = 0.1
"""The grids of starting points: floors as shares of the smallest y, their slopes in the logs, exponents;
the term in tokens as a share of the losses at about the most tokens."""


@dataclass(frozen=True)
class Problem:
    """Residuals √w·(ln y − law) in centred logs.

    The rows have a canonical order and the logs are centred, so that neither the order of the rows nor the units of a
    variable can change the optimum.
    """

    law: Law
    phi: Array
    """(terms, points, params), centred."""
    y: Array
    """ln y minus its mean (points,)."""
    root_weight: Array
    """(points,)"""
    means: dict[str, float]
    """Mean of each input's log."""
    y_mean: float
    order: np.ndarray
    """Row of the table behind each point."""
    inputs: dict[str, Array]
    """The inputs of the law, by role (points,)."""
    group: np.ndarray | None = None
    """Number of the run of each point (points,), if several points are of one run."""
    shrink: float = 0.0
    """What is subtracted from the residuals of a run: this share of their mean (see `run_effects`)."""
    between: float = 0.0
    """How many coefficients the differences between runs determine; the shapes of the curves determine the others."""

    def residual(self, theta: Array) -> Array:
        """Weighted residuals (points,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._whitened(self.root_weight * (self.law.log_value(theta, self.phi) - self.y))

    def jacobian(self, theta: Array) -> Array:
        """Derivatives of the residuals (points, params)."""
        with np.errstate(over="ignore", invalid="ignore"):
            return self._whitened(self.root_weight[:, None] * self.law.jacobian(theta, self.phi))

    def unit(self) -> Array:
        """What an equal rise of ln y at all points takes from the residuals (points,)."""
        return self._whitened(self.root_weight)

    def _whitened(self, values: Array) -> Array:
        """Values (points, …) less a share of their mean over each run."""
        if self.group is None or self.shrink == 0.0:
            return values
        total = np.zeros((int(self.group.max()) + 1, *values.shape[1:]))
        np.add.at(total, self.group, values)
        count = np.maximum(np.bincount(self.group), 1).reshape(-1, *[1] * (values.ndim - 1))
        return values - self.shrink * (total / count)[self.group]

    @property
    def points(self) -> int:
        """Number of points."""
        return len(self.y)

    @property
    def size(self) -> int:
        """Number of coefficients."""
        return len(self.law.params)

    @property
    def dof(self) -> int:
        """Degrees of freedom of the intervals: those of the points, or of the runs if several points are of one."""
        if self.group is None:
            return self.points - self.size
        return math.floor(len(np.unique(self.group)) - self.between + 1e-9)

    def take(self, rows: np.ndarray) -> Problem:
        """The same problem on some of its points (repeats allowed), with the same centring."""
        return replace(
            self,
            phi=self.phi[:, rows],
            y=self.y[rows],
            root_weight=self.root_weight[rows],
            order=self.order[rows],
            inputs={name: values[rows] for name, values in self.inputs.items()},
            group=None if self.group is None else self.group[rows],
        )

    def raw_map(self) -> tuple[Array, Array]:
        """(M, offset): raw coefficients = M @ theta + offset."""
        return self.law.centring_matrix(self.means), self.law.centring_offset(self.means, self.y_mean)


def pose(law: Law, inputs: Mapping[str, Array], y: Array, weights: Array | None = None) -> Problem:
    """Centre the data of a law.

    Args:
        inputs: Role → positive values (points,), one for each of `law.inputs`.
        y: Positive values (points,).
        weights: Relative inverse variances of ln y (points,); None is all ones.
    """
    logs = {name: np.log(np.asarray(inputs[name], dtype=float)) for name in law.inputs}
    target = np.log(np.asarray(y, dtype=float))
    weight = np.ones(len(target)) if weights is None else np.asarray(weights, dtype=float)
    order = np.lexsort((weight, target, *logs.values()))
    logs = {name: values[order] for name, values in logs.items()}
    means = {name: float(values.mean()) for name, values in logs.items()}
    target, weight = target[order], weight[order]
    y_mean = float(target.mean())
    phi = law.features({name: values - means[name] for name, values in logs.items()})
    root = np.sqrt(weight / weight.mean())
    own = {name: np.asarray(inputs[name], dtype=float)[order] for name in law.inputs}
    return Problem(law, phi, target - y_mean, root, means, y_mean, order, own)


def starting_points(problem: Problem, count: int, seed: int) -> list[Array]:
    """`count` starts: the best points of a grid, then random ones around the best.

    The grid is variable projection: with the floor fixed, ln(y − floor) is linear in all other coefficients. With three
    terms the exponents are fixed, and y is linear in the positive amplitudes.
    """
    count = max(count, 2)
    grid = _grid(problem)
    scored = sorted(grid, key=lambda theta: float(np.sum(problem.residual(theta) ** 2)))
    kept = scored[: max(1, min(len(scored), count // 4))]
    rng = np.random.default_rng(seed)
    centre = scored[0]
    spread = np.array([1.0 if _is_constant(problem.law, i) else 0.5 for i in range(problem.size)])
    random = [centre + spread * rng.standard_normal(problem.size) for _ in range(count - len(kept))]
    return kept + random


def _is_constant(law: Law, index: int) -> bool:
    name = law.params[index]
    if isinstance(law, SmoothBreak):
        return name in law.exp_params
    return any(entry.param == name and not entry.monomial for term in law.terms for entry in term)


def _grid(problem: Problem) -> list[Array]:
    if isinstance(problem.law, SmoothBreak):
        return _break_grid(problem, problem.law)
    if len(problem.law.terms) == 1:
        return [_linear(problem, problem.phi[0], problem.y, np.ones(problem.points))]
    if len(problem.law.terms) == 2 and problem.law.floor is not None:
        return _floor_grid(problem)
    if {"n", "k", "d"} <= set(problem.law.inputs):
        return _token_grid(problem)
    return _exponent_grid(problem)


def _linear(problem: Problem, design: Array, target: Array, scale: Array) -> Array:
    weight = problem.root_weight * scale
    return np.asarray(np.linalg.lstsq(design * weight[:, None], target * weight, rcond=None)[0], dtype=np.float64)


def _floor_grid(problem: Problem) -> list[Array]:
    """Two terms, one of them a floor: fix the floor, solve the logs of the other term linearly."""
    law, floor = problem.law, problem.law.floor
    assert floor is not None
    owned = [i for i, name in enumerate(law.params) if any(e.param == name for e in law.terms[floor])]
    free = [i for i in range(problem.size) if i not in owned]
    floor_phi = problem.phi[floor][:, owned]
    constant = [i for i, j in enumerate(owned) if _is_constant(law, j)]
    slopes = FLOOR_SLOPES if len(owned) > 1 else (0.0,)
    y = np.exp(problem.y)
    starts = []
    for slope, share in product(slopes, FLOOR_SHARES):
        theta = np.zeros(problem.size)
        coefficients = np.full(len(owned), slope)
        coefficients[constant] = 0.0
        shape = floor_phi @ coefficients
        level = np.log(share) + float(np.min(problem.y - shape))
        coefficients[constant] = level
        theta[owned] = coefficients
        rest = np.maximum(y - np.exp(shape + level), 1e-12)
        design = problem.phi[1 - floor][:, free]
        theta[free] = _linear(problem, design, np.log(rest), rest / y)
        starts.append(theta)
    return starts


def _token_grid(problem: Problem) -> list[Array]:
    """L(n, k) and a term in tokens: fix what the term is of the last losses and its exponent; the grid of L(n, k) alone
    starts from the rest of the last losses."""
    base = get("sae_nk" if problem.law.floor is not None else "sae_nk_no_floor")
    matrix, offset = problem.raw_map()
    log_d = np.log(problem.inputs["d"])
    last = log_d > log_d.max() - TOKENS_AT_END
    y = np.exp(problem.y[last] + problem.y_mean)
    inputs = {name: problem.inputs[name][last] for name in base.inputs}
    starts = []
    for share, decay in product(TOKEN_SHARES, DECAYS[1:5]):
        rest = pose(base, inputs, y * (1 - share))
        own_matrix, own_offset = rest.raw_map()
        scored = sorted(_grid(rest), key=lambda theta: float(np.sum(rest.residual(theta) ** 2)))
        for theta in scored[:2]:
            raw = dict(zip(base.params, own_matrix @ theta + own_offset, strict=True))
            raw |= {"delta": np.log(share * y.mean()) + decay * log_d.max(), "beta_d": decay}
            values = np.array([raw.get(name, 0.0) for name in problem.law.params])
            starts.append(np.asarray(np.linalg.solve(matrix, values - offset), dtype=np.float64))
    return starts


def _break_grid(problem: Problem, law: SmoothBreak) -> list[Array]:
    """The law without a break, with a bend of either sign added at several places."""
    u = problem.phi[0, :, 0]
    plain = get("power" if law.floor is None else "power_floor")
    simple = replace(problem, law=plain, phi=plain.features({"x": u}))
    found = sorted(_grid(simple), key=lambda theta: float(np.sum(simple.residual(theta) ** 2)))[:3]
    places = np.quantile(u, [0.25, 0.5, 0.75])
    return [
        np.array([*levels, place, log_f, a, c])
        for (*levels, a), place, log_f, c in product(found, places, (-1.5, 0.0), (-0.2, 0.2))
    ]


def _exponent_grid(problem: Problem) -> list[Array]:
    """Several decaying terms: fix the exponents, solve for positive amplitudes (NNLS on relative errors)."""
    law, y = problem.law, np.exp(problem.y)
    constants = [next(law.params.index(e.param) for e in term if not e.monomial) for term in law.terms]
    exponents = [i for i in range(problem.size) if i not in constants]
    starts = []
    for decay in product(DECAYS, repeat=len(exponents)):
        theta = np.zeros(problem.size)
        theta[exponents] = decay
        columns = np.exp(problem.phi @ theta).T
        amplitudes, _ = nnls(columns / y[:, None] * problem.root_weight[:, None], problem.root_weight)
        theta[constants] = np.log(np.maximum(amplitudes, 1e-6))
        starts.append(theta)
    return starts
