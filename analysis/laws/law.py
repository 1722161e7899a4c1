"""What a law is: a sum of exponentials of linear forms in the logs of its inputs, with its analytic Jacobian.

Every law but one (`SmoothBreak`) is

    y = Σ_t exp(Σ_j θ_j · φ_tj(ln x)),      φ a monomial in the logs, e.g. ln k · ln n,

so that one formula gives the value and the Jacobian of all: ∂ ln y / ∂θ_j = Σ_t w_t φ_tj with w_t the share of term t
in y. Amplitudes and floors are positive and enter as their logarithms; `exp_params` names those reported as exp(θ).

Fits run in *centred* coordinates, u = ln x − mean(ln x): the same law with other coefficients, far better conditioned.
`centring_matrix` is the exact linear map from centred to raw coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Monomial = tuple[str, ...]
"""The inputs whose logs are multiplied: () is a constant, ("k", "n") is ln k · ln n."""


@dataclass(frozen=True)
class Entry:
    """One product sign · θ_param · Π ln x over `monomial` inside a term's exponent."""

    param: str
    monomial: Monomial = ()
    sign: float = 1.0


@dataclass(frozen=True)
class Law:
    """A sum of exponentials of linear forms in the logs of `inputs`."""

    name: str
    formula: str
    inputs: tuple[str, ...]
    """Roles of the independent variables, e.g. ("n", "k")."""
    terms: tuple[tuple[Entry, ...], ...]
    exp_params: tuple[str, ...] = ()
    """Parameters reported as exp of the fitted coefficient: amplitudes and floors."""
    floor: int | None = None
    """Index of the term that remains as the scale grows; None for a law without a floor."""
    scale_input: str = "n"
    """The input that lowers y as it grows; extrapolation and hold-outs go along it."""
    nested: tuple[str, ...] = ()
    """Names of simpler forms that this law contains."""
    min_levels: Mapping[str, int] = field(default_factory=dict[str, int])
    """Fewest distinct values of each input that determine every parameter."""

    @cached_property
    def params(self) -> tuple[str, ...]:
        """Names in the order of `cov`: those of `exp_params` first, else in order of appearance."""
        names = dict.fromkeys(entry.param for term in self.terms for entry in term)
        return tuple(sorted(names, key=lambda name: name not in self.exp_params))

    def features(self, logs: Mapping[str, Array]) -> Array:
        """φ (terms, points, params) at the given logs of the inputs."""
        points = len(logs[self.inputs[0]])
        phi = np.zeros((len(self.terms), points, len(self.params)))
        for t, term in enumerate(self.terms):
            for entry in term:
                product = np.full(points, entry.sign)
                for name in entry.monomial:
                    product = product * logs[name]
                phi[t, :, self.params.index(entry.param)] += product
        return phi

    def centring_matrix(self, means: Mapping[str, float]) -> Array:
        """M (params, params): raw θ = M @ centred θ, up to `centring_offset`.

        Expands Π (ln x − mean) into monomials of ln x; every lower monomial of a term must be among its entries.
        """
        size = len(self.params)
        matrix = np.zeros((size, size))
        for term in self.terms:
            home = {tuple(sorted(entry.monomial)): entry for entry in term}
            for entry in term:
                for kept, coefficient in _expand(entry.monomial, means).items():
                    if coefficient == 0.0:
                        continue
                    target = home[kept]
                    row, column = self.params.index(target.param), self.params.index(entry.param)
                    matrix[row, column] = target.sign * entry.sign * coefficient
        return matrix

    def centring_offset(self, means: Mapping[str, float], y_mean: float) -> Array:
        """What centring adds to the raw coefficients (params,)."""
        offset = np.zeros(len(self.params))
        for term in self.terms:
            for entry in term:
                if not entry.monomial:
                    offset[self.params.index(entry.param)] = entry.sign * y_mean
        return offset

    def log_value(self, theta: Array, phi: Array) -> Array:
        """ln y (points,) for coefficients theta (params,)."""
        return np.asarray(np.logaddexp.reduce(phi @ theta, axis=0), dtype=np.float64)

    def jacobian(self, theta: Array, phi: Array) -> Array:
        """∂ ln y / ∂ theta (points, params)."""
        logs = phi @ theta
        shares = np.exp(logs - np.logaddexp.reduce(logs, axis=0))
        return np.einsum("tn,tnp->np", shares, phi)

    @property
    def floor_params(self) -> tuple[str, ...]:
        """Parameters of the floor; empty for a law without one."""
        return () if self.floor is None else tuple(dict.fromkeys(entry.param for entry in self.terms[self.floor]))

    def log_floor(self, theta: Array, phi: Array) -> Array:
        """ln of the floor (points,); −inf for a law without one."""
        return np.full(len(phi[0]), -np.inf) if self.floor is None else phi[self.floor] @ theta

    def reported(self, raw: Array) -> Array:
        """Raw coefficients (params,) as they are reported: amplitudes and floors as exp. Overflow becomes inf."""
        out = raw.astype(float).copy()
        for i, name in enumerate(self.params):
            if name in self.exp_params:
                with np.errstate(over="ignore", under="ignore"):
                    out[i] = np.exp(raw[i])
        return out


def _expand(monomial: Monomial, means: Mapping[str, float]) -> dict[Monomial, float]:
    """The product of (ln x − mean) over `monomial`, as {monomial in ln x: coefficient}."""
    expansion: dict[Monomial, float] = {(): 1.0}
    for name in monomial:
        longer: dict[Monomial, float] = {}
        for kept, coefficient in expansion.items():
            grown = tuple(sorted((*kept, name)))
            longer[grown] = longer.get(grown, 0.0) + coefficient
            longer[kept] = longer.get(kept, 0.0) - coefficient * means[name]
        expansion = longer
    return expansion


class SmoothBreak(Law):
    """E + A·x^−a·(1 + (x/x1)^(1/f))^(−c·f): a power law whose exponent changes from a to a + c around x1.

    Coefficients: ln E (not if `floor` is None), ln A, ln x1, ln f, a, c. With u = ln x and s = (u − ln x1)/f, the
    second term has the logarithm ln A − a·u − c·f·ln(1 + e^s).
    """

    @cached_property
    def params(self) -> tuple[str, ...]:
        return (*self.floor_params, "A", "x1", "f", "a", "c")

    def features(self, logs: Mapping[str, Array]) -> Array:
        """ln x as (1, points, 1)."""
        return logs["x"][None, :, None]

    def centring_matrix(self, means: Mapping[str, float]) -> Array:
        matrix = np.eye(len(self.params))
        matrix[self.params.index("A"), self.params.index("a")] = means["x"]
        return matrix

    def centring_offset(self, means: Mapping[str, float], y_mean: float) -> Array:
        shift = {"E": y_mean, "A": y_mean, "x1": means["x"]}
        return np.array([shift.get(name, 0.0) for name in self.params])

    def log_value(self, theta: Array, phi: Array) -> Array:
        return np.logaddexp(self.log_floor(theta, phi), self._second(theta, phi[0, :, 0])[0])

    def jacobian(self, theta: Array, phi: Array) -> Array:
        u = phi[0, :, 0]
        second, s, f = self._second(theta, u)
        share = np.exp(second - np.logaddexp(self.log_floor(theta, phi), second))
        sigmoid = np.exp(-np.logaddexp(0.0, -s))
        soft, c = np.logaddexp(0.0, s), theta[-1]
        columns = [share, share * c * sigmoid]
        columns += [share * -c * f * (soft - s * sigmoid), share * -u, share * -f * soft]
        return np.stack(columns if self.floor is None else [1 - share, *columns], axis=1)

    @property
    def floor_params(self) -> tuple[str, ...]:
        return () if self.floor is None else ("E",)

    def log_floor(self, theta: Array, phi: Array) -> Array:
        return np.full(len(phi[0]), -np.inf if self.floor is None else theta[0])

    @staticmethod
    def _second(theta: Array, u: Array) -> tuple[Array, Array, float]:
        log_a, log_x1, log_f, a, c = theta[-5:]
        f = float(np.exp(np.clip(log_f, -30, 30)))
        s = (u - log_x1) / f
        return log_a - a * u - c * f * np.logaddexp(0.0, s), s, f
