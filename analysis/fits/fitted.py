"""`FittedLaw`: a law with fitted coefficients and their covariance. It predicts, with bands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from analysis.fits.intervals import critical_t, form_variance
from analysis.format import Interval
from analysis.laws.law import Array, Law
from analysis.notes import Note, note
from harness.errors import UserError

CONVERGED = 1e40
"""Tokens that stand for convergence: a term in tokens has vanished."""


@dataclass(kw_only=True)
class FittedLaw:
    """A law and its coefficients. They are kept centred (`theta`), so that predictions lose no digits."""

    law: Law
    theta: Array
    """Coefficients in centred coordinates (params,)."""
    means: dict[str, float]
    """Mean of the logs of each input."""
    y_mean: float
    """Mean of ln y."""
    theta_cov: Array
    """Covariance of `theta` (params, params)."""
    intervals: dict[str, Interval]
    """Name → interval of the reported parameter; None for an open end."""
    rss: float
    """Σ of the squared (weighted) residuals of ln y."""
    dof: int
    points: int
    run_variance: float = 0.0
    """Variance of ln y that all points of one run share; 0 if each point is a run."""
    level: float = 0.95
    """Confidence level of every interval."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role → column of the fitted table (the inputs and "loss")."""
    domain: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Range of each input in the data."""
    weighting: dict[str, float] = field(default_factory=dict)
    """The model of the seed noise behind the weights: slope, centre, mean weight. Empty if all weights are one."""

    # -- parameters ---------------------------------------------------------------------------------------------------

    @property
    def raw(self) -> Array:
        """Coefficients of the raw logs (params,); amplitudes and floors are still logarithms."""
        matrix, offset = self.raw_map()
        return matrix @ self.theta + offset

    @property
    def cov(self) -> Array:
        """Covariance of the reported parameters (params, params), in the order of `law.params`."""
        matrix, _ = self.raw_map()
        scale = np.array([value if name in self.law.exp_params else 1.0 for name, value in self.values.items()])
        with np.errstate(invalid="ignore", over="ignore"):
            return matrix @ self.theta_cov @ matrix.T * np.outer(scale, scale)

    @property
    def values(self) -> dict[str, float]:
        """Name → estimate."""
        return dict(zip(self.law.params, map(float, self.law.reported(self.raw)), strict=True))

    @property
    def params(self) -> pd.DataFrame:
        """One row per parameter: value, lo, hi (NaN for an open end), se."""
        with np.errstate(invalid="ignore"):
            se = np.sqrt(np.diag(self.cov))
        rows = {
            name: {"value": value, "lo": self.intervals[name][0], "hi": self.intervals[name][1], "se": se[i]}
            for i, (name, value) in enumerate(self.values.items())
        }
        return pd.DataFrame.from_dict(rows, orient="index").astype(float)

    @property
    def variance(self) -> float:
        """Variance of ln y of one run around the law, at mean weight; NaN without degrees of freedom."""
        spare = self.points - len(self.theta)
        return self.rss / spare + self.run_variance if spare > 0 else float("nan")

    @property
    def converges(self) -> bool:
        """Whether the law has a term in tokens beside one in n and k, so that it has a value at convergence."""
        return {"n", "k", "d"} <= set(self.law.inputs)

    def coefficient(self, name: str) -> tuple[Array, float]:
        """(row, offset): the raw coefficient of that name is row @ theta + offset."""
        matrix, offset = self.raw_map()
        i = self.law.params.index(name)
        return matrix[i], float(offset[i])

    def coefficient_se(self, name: str) -> float:
        """Standard error of a raw coefficient; NaN or inf if the data do not determine it."""
        row, _ = self.coefficient(name)
        with np.errstate(invalid="ignore"):
            return float(np.sqrt(row @ self.theta_cov @ row))

    def raw_map(self) -> tuple[Array, Array]:
        """(M, offset): raw coefficients = M @ theta + offset."""
        return self.law.centring_matrix(self.means), self.law.centring_offset(self.means, self.y_mean)

    # -- predictions --------------------------------------------------------------------------------------------------

    def log_value(self, inputs: Mapping[str, Any]) -> Array:
        """ln y of the law (points,) at arrays of its inputs, by role."""
        return self.law.log_value(self.theta, self._features(inputs)) + self.y_mean

    def value(self, inputs: Mapping[str, Any]) -> Array:
        """y of the law (points,) at arrays of its inputs, by role."""
        return np.exp(self.log_value(inputs))

    def floor(self, inputs: Mapping[str, Any]) -> Array:
        """The part of y (points,) that remains when `law.scale_input` grows; zeros for a law without a floor."""
        return np.exp(self.law.log_floor(self.theta, self._features(inputs)) + self.y_mean)

    def predict(self, frame: pd.DataFrame | Mapping[str, Any], kind: str = "mean") -> pd.DataFrame:
        """The law at new inputs, with a band and its distance from the data.

        Args:
            frame: Columns by role ("n", "k", …) or by the names of the table's own columns. A law with a term for
                tokens (`sae_nkd`) is at convergence if they hold no tokens.
            kind: `mean` for the band of the law itself, `new_run` for the band of one further run.

        Returns a frame: the inputs, `value`, `lo`, `hi`, `extrapolation` (distance outside the data in units of the
        span of their logs: 0 inside, 1 as far beyond the edge as the data are wide). `lo` and `hi` are 0 and inf
        without degrees of freedom, and NaN if a degenerate covariance gives no band (`band_notes` says so). Raises
        `UserError` for an unknown kind or a missing input.
        """
        if kind not in ("mean", "new_run"):
            raise UserError(f"kind={kind!r} is not known; use 'mean' or 'new_run'")
        inputs = self._inputs(frame)
        phi = self._features(inputs)
        log_y = self.law.log_value(self.theta, phi)
        jac = self.law.jacobian(self.theta, phi)
        half = np.full(len(log_y), np.inf)
        if self.dof > 0:
            variance = form_variance(jac, self.theta_cov)
            if kind == "new_run":
                variance = variance + self.variance / self._relative_weight(inputs)
            half = critical_t(self.dof, self.level) * np.sqrt(variance)
        out = pd.DataFrame(dict(inputs))
        with np.errstate(over="ignore"):
            out["value"] = np.exp(log_y + self.y_mean)
            out["lo"], out["hi"] = np.exp(log_y - half + self.y_mean), np.exp(log_y + half + self.y_mean)
        out["extrapolation"] = self.extrapolation(inputs)
        return out

    def extrapolation(self, inputs: Mapping[str, Any]) -> Array:
        """Distance outside the data (points,): the largest over the inputs, in spans of the input's logs."""
        far = np.zeros(len(np.atleast_1d(inputs[self.law.inputs[0]])))
        for name in (name for name in self.law.inputs if name in inputs):
            low, high = (math.log(edge) for edge in self.domain[name])
            x = np.log(np.atleast_1d(np.asarray(inputs[name], dtype=float)))
            x = np.where(x < math.log(CONVERGED), x, high) if name == "d" else x  # a limit is no distance
            far = np.maximum(far, np.maximum(low - x, x - high) / max(high - low, 1e-12))
        return np.maximum(far, 0.0)

    def extrapolation_notes(self, inputs: Mapping[str, Any]) -> list[Note]:
        """A note if any of the inputs lies outside the data."""
        far = self.extrapolation(inputs)
        if not np.any(far > 1e-9):
            return []
        text = f"{int(np.sum(far > 1e-9))} prediction(s) outside the data, up to {far.max():.2f} of its span in logs"
        return [note("extrapolation", "warning" if far.max() > 0.5 else "info", text)]

    def band_notes(self, band: pd.DataFrame) -> list[Note]:
        """A note if `predict` gave no band for some of its points."""
        missing = int(band["lo"].isna().sum())
        if not missing:
            return []
        text = f"{missing} prediction(s) without a band: the covariance of the coefficients is degenerate there"
        return [note("degenerate_design", "error", text)]

    def _relative_weight(self, inputs: Mapping[str, Any]) -> Array:
        scale = np.log(np.atleast_1d(np.asarray(inputs[self.law.scale_input], dtype=float)))
        if not self.weighting:
            return np.ones(len(scale))
        weight = np.exp(-self.weighting["slope"] * (scale - self.weighting["centre"]))
        return weight / self.weighting["mean"]

    def _inputs(self, frame: pd.DataFrame | Mapping[str, Any]) -> dict[str, Array]:
        inputs = {}
        for name in self.law.inputs:
            column = name if name in frame else self.columns.get(name, name)
            if column not in frame and name == "d" and self.converges:
                inputs[name] = np.full(len(inputs["n"]), CONVERGED)
                continue
            if column not in frame:
                raise UserError(f"{self.law.name} needs {name!r} (column {column!r}) to predict")
            inputs[name] = np.atleast_1d(np.asarray(frame[column], dtype=float))
        return inputs

    def _features(self, inputs: Mapping[str, Any]) -> Array:
        if "d" not in inputs and self.converges:
            inputs = {**inputs, "d": np.full(np.shape(np.atleast_1d(inputs["n"])), CONVERGED)}
        logs = {name: np.log(np.atleast_1d(np.asarray(inputs[name], float))) for name in self.law.inputs}
        return self.law.features({name: values - self.means[name] for name, values in logs.items()})
