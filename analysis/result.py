"""`FitResult`: a fitted law — parameters, covariance, notes, predictions — and its JSON form."""

from __future__ import annotations

import enum
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.frames import Frame, pd
from analysis.intervals import critical_t, form_variance, profile, wald
from analysis.law import Array, Law
from analysis.laws import LAWS
from analysis.notes import Note, has, note
from analysis.problem import Problem
from harness.errors import UserError
from harness.files import write_json_atomic


class Status(enum.StrEnum):
    """How far a fit can be trusted."""

    OK = "ok"
    """Converged, every interval closed."""
    OPEN = "open"
    """Converged, but the data do not bound at least one parameter."""
    UNRELIABLE = "unreliable"
    """A note of severity error: not a converged fit, or a degenerate design."""
    FAILED = "failed"
    """No fit was possible; the notes say why."""


@dataclass
class FitResult:
    """What `fit` returns. Coefficients are kept centred (`theta`), so that predictions lose no digits."""

    law: Law
    theta: Array
    """Coefficients in centred coordinates (params,)."""
    means: dict[str, float]
    y_mean: float
    theta_cov: Array
    """Their covariance (params, params)."""
    intervals: dict[str, tuple[float | None, float | None]]
    """Reported scale, None for an open end."""
    rss: float
    """Σ of squared (weighted) residuals of ln y."""
    dof: int
    points: int
    notes: list[Note]
    status: Status
    level: float = 0.95
    ci: str = "profile"
    space: str = "log"
    robust: str | None = None
    reached: float = 1.0
    """Share of the starts that reached this optimum."""
    starts: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    """Role → column of the table it was fitted to (the inputs and "loss")."""
    domain: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Range of each input in the data."""
    weighting: dict[str, float] = field(default_factory=dict)
    """Seed-noise model behind the weights: slope, centre, mean weight; empty when all weights are one."""
    nested: list[dict[str, Any]] = field(default_factory=list)
    """Comparison with simpler forms: law, parameters, rss_log, aicc, holdout."""
    excluded: list[dict[str, str]] = field(default_factory=list)
    """Every run that did not enter: run, reason."""
    data_hash: str = ""
    problem: Problem | None = field(default=None, repr=False)
    """The data behind the fit; absent after `from_json`."""
    runs: list[str] = field(default_factory=list, repr=False)
    inputs: dict[str, Array] = field(default_factory=dict, repr=False)
    """The fitted inputs by role, in the order of the table."""
    y: Array = field(default_factory=lambda: np.empty(0), repr=False)
    weights: Array | None = field(default=None, repr=False)

    # -- parameters ---------------------------------------------------------------------------------------------------

    @property
    def raw(self) -> Array:
        """Coefficients of the raw logs (amplitudes and floors still as logarithms)."""
        matrix, offset = self._map()
        return matrix @ self.theta + offset

    @property
    def cov(self) -> Array:
        """Covariance of the reported parameters, in the order of `law.params`."""
        matrix, _ = self._map()
        scale = np.array([value if name in self.law.exp_params else 1.0 for name, value in self.values.items()])
        with np.errstate(invalid="ignore", over="ignore"):
            return matrix @ self.theta_cov @ matrix.T * np.outer(scale, scale)

    @property
    def values(self) -> dict[str, float]:
        """Name → estimate."""
        return dict(zip(self.law.params, map(float, self.law.reported(self.raw)), strict=True))

    @property
    def params(self) -> Frame:
        """One row a parameter: value, lo, hi (NaN where open), se."""
        with np.errstate(invalid="ignore"):
            se = np.sqrt(np.diag(self.cov))
        rows = {
            name: {"value": value, "lo": self.intervals[name][0], "hi": self.intervals[name][1], "se": se[i]}
            for i, (name, value) in enumerate(self.values.items())
        }
        return pd.DataFrame.from_dict(rows, orient="index").astype(float)

    @property
    def problem_size(self) -> int:
        """Number of parameters."""
        return len(self.law.params)

    @property
    def variance(self) -> float:
        """Residual variance s² of ln y at mean weight; NaN without degrees of freedom."""
        return self.rss / self.dof if self.dof > 0 else float("nan")

    def coefficient(self, name: str) -> tuple[Array, float]:
        """(row, offset): the raw coefficient of that name is row @ theta + offset."""
        matrix, offset = self._map()
        i = self.law.params.index(name)
        return matrix[i], float(offset[i])

    def coefficient_se(self, name: str) -> float:
        """Standard error of a raw coefficient; NaN or inf where the data do not determine it."""
        row, _ = self.coefficient(name)
        with np.errstate(invalid="ignore"):
            return float(np.sqrt(row @ self.theta_cov @ row))

    def _map(self) -> tuple[Array, Array]:
        return self.law.centring_matrix(self.means), self.law.centring_offset(self.means, self.y_mean)

    # -- using it -----------------------------------------------------------------------------------------------------

    def log_value(self, inputs: Mapping[str, Any]) -> Array:
        """ln y of the law at arrays of its inputs (by role)."""
        return self.law.log_value(self.theta, self._features(inputs)) + self.y_mean

    def value(self, inputs: Mapping[str, Any]) -> Array:
        """y of the law at arrays of its inputs (by role)."""
        return np.exp(self.log_value(inputs))

    def floor(self, inputs: Mapping[str, Any]) -> Array:
        """The part of y that growth along `law.scale_input` does not remove; zeros for a law without one."""
        return np.exp(self.law.log_floor(self.theta, self._features(inputs)) + self.y_mean)

    def predict(self, frame: Frame | Mapping[str, Any], kind: str = "mean") -> Frame:
        """The law at new inputs, with a band and a warning where it extrapolates.

        Args:
            frame: Columns by role ("n", "k", …) or by the table's own column names.
            kind: `mean`, where the law itself lies; `new_run`, where one further run would fall.

        Returns a frame: the inputs, `value`, `lo`, `hi`, `extrapolation` (how far outside the data, in units of the
        data's own span of logs: 0 inside, 1 as far beyond the edge as the data are wide). `lo` and `hi` are 0 and inf
        without degrees of freedom, and NaN where a degenerate covariance gives no band (`band_notes` says so).
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
        """Distance outside the data along each input, in spans of its logs; the largest over inputs (points,)."""
        far = np.zeros(len(np.atleast_1d(inputs[self.law.inputs[0]])))
        for name in self.law.inputs:
            low, high = (math.log(edge) for edge in self.domain[name])
            x = np.log(np.atleast_1d(np.asarray(inputs[name], dtype=float)))
            far = np.maximum(far, np.maximum(low - x, x - high) / max(high - low, 1e-12))
        return np.maximum(far, 0.0)

    def extrapolation_notes(self, inputs: Mapping[str, Any]) -> list[Note]:
        """A note when any of the inputs lies outside the data."""
        far = self.extrapolation(inputs)
        if not np.any(far > 1e-9):
            return []
        text = f"{int(np.sum(far > 1e-9))} prediction(s) outside the data, up to {far.max():.2f} of its span in logs"
        return [note("extrapolation", "warning" if far.max() > 0.5 else "info", text)]

    def band_notes(self, band: Frame) -> list[Note]:
        """A note when `predict` could not give a band somewhere."""
        missing = int(band["lo"].isna().sum())
        if not missing:
            return []
        text = f"{missing} prediction(s) without a band: the covariance of the coefficients is degenerate there"
        return [note("degenerate_design", "error", text)]

    def contrast(self, weights: Mapping[str, float]) -> tuple[float, float | None, float | None]:
        """Σ weight·coefficient with its interval, e.g. {"beta_n": 1, "gamma": ln k} is the local slope in n.

        Coefficients of `exp_params` enter as logarithms. A profile while the data are at hand, else Wald.
        """
        matrix, offset = self._map()
        raw = np.array([weights.get(name, 0.0) for name in self.law.params])
        inner = raw @ matrix
        shift = float(raw @ offset)
        estimate = float(inner @ self.theta)
        with np.errstate(invalid="ignore"):
            se = float(np.sqrt(inner @ self.theta_cov @ inner))
        if self.dof < 1:
            return estimate + shift, None, None
        if self.problem is not None and self.ci == "profile":
            low, high = profile(self.problem, self.theta, self.rss, inner, se, self.level)
        else:
            low, high = wald(estimate, se, self.dof, self.level)
        return estimate + shift, _plus(low, shift), _plus(high, shift)

    def slope(self, along: str, at: Mapping[str, float] | None = None) -> tuple[float, float | None, float | None]:
        """d ln(reducible part) / d ln(input) with its interval, the other inputs held at `at`.

        The reducible part is the one term that decays along that input: slope("n", at={"k": 64}) is β_n + γ ln 64.
        """
        matches = [t for t in self.law.terms if any(along in entry.monomial for entry in t) and t != self._floor_term()]
        if len(matches) != 1:
            raise UserError(f"{self.law.name} has no single term that changes with {along!r}")
        weights: dict[str, float] = {}
        for entry in matches[0]:
            if along in entry.monomial:
                others = list(entry.monomial)
                others.remove(along)
                missing = [name for name in others if name not in (at or {})]
                if missing:
                    raise UserError(
                        f"the slope along {along} of {self.law.name} depends on {missing[0]}; give at={{…}}"
                    )
                weights[entry.param] = entry.sign * math.prod(math.log((at or {})[name]) for name in others)
        return self.contrast(weights)

    def _floor_term(self) -> tuple | None:
        return None if self.law.floor is None else self.law.terms[self.law.floor]

    def holdout(self, by: str | None = None, top: int = 1) -> dict[str, float | None]:
        """How well the law predicts the `top` largest values of `by` when fitted without them.

        Returns root-mean-square errors of ln(loss): `error` of this law, `no_floor` of its form without a floor (where
        it has one), `last_slope` of continuing each series' last slope; None where too little is left.
        """
        from analysis.nested import holdout_error, last_slope_error

        if self.problem is None:
            raise UserError("a fit read from JSON has no data; fit the table again to hold some out")
        along = by or self.law.scale_input
        if along not in self.law.inputs:
            raise UserError(f"by={along!r} is not an input of {self.law.name}: {', '.join(self.law.inputs)}")
        floorless = next((LAWS[name] for name in self.law.nested if LAWS[name].floor is None), None)
        return {
            "error": holdout_error(self.law, self.inputs, self.y, self.weights, along, top),
            "no_floor": floorless and holdout_error(floorless, self.inputs, self.y, self.weights, along, top),
            "last_slope": last_slope_error(self.inputs, self.y, along) if top == 1 else None,
        }

    def residuals(self) -> Frame:
        """Per fitted point: run, the inputs, y, fitted, residual (ln y − ln fitted), in the fit's own order."""
        assert self.problem is not None, "the data are not part of the JSON form"
        log_fit = self.law.log_value(self.theta, self.problem.phi)
        return pd.DataFrame(
            {
                "run": self.runs,
                "row": self.problem.order,
                "y": np.exp(self.problem.y + self.y_mean),
                "fitted": np.exp(log_fit + self.y_mean),
                "residual": self.problem.y - log_fit,
            }
        )

    def _relative_weight(self, inputs: Mapping[str, Any]) -> Array:
        scale = np.log(np.atleast_1d(np.asarray(inputs[self.law.scale_input], dtype=float)))
        if not self.weighting:
            return np.ones(len(scale))
        weight = np.exp(-self.weighting["slope"] * (scale - self.weighting["centre"]))
        return weight / self.weighting["mean"]

    def _inputs(self, frame: Frame | Mapping[str, Any]) -> dict[str, Array]:
        inputs = {}
        for name in self.law.inputs:
            column = name if name in frame else self.columns.get(name, name)
            if column not in frame:
                raise UserError(f"{self.law.name} needs {name!r} (column {column!r}) to predict")
            inputs[name] = np.atleast_1d(np.asarray(frame[column], dtype=float))
        return inputs

    def _features(self, inputs: Mapping[str, Any]) -> Array:
        logs = {name: np.log(np.atleast_1d(np.asarray(inputs[name], float))) for name in self.law.inputs}
        return self.law.features({name: values - self.means[name] for name, values in logs.items()})

    # -- showing and storing ------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The law, its parameters with intervals, and the notes, as text."""
        lines = [f"{self.law.name}: y = {self.law.formula}", f"status: {self.status.value}"]
        for name, row in self.params.iterrows():
            low, high = self.intervals[str(name)]
            lines.append(f"  {name:<8} {row['value']: .6g}   {format_interval(low, high)}")
        if self.dof > 0:
            lines.append(f"  residuals {100 * math.sqrt(self.variance):.2g} % over {self.points} runs, {self.dof} dof")
        lines.extend(str(entry) for entry in self.notes)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        notes = "".join(f"<li>{html.escape(str(entry))}</li>" for entry in self.notes)
        head = f"<p><b>{self.law.name}</b>: y = {html.escape(self.law.formula)} — status {self.status.value}</p>"
        return head + self.params.to_html(na_rep="open") + f"<ul>{notes}</ul>"

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: the contract's keys first, then what `from_json` needs."""
        from analysis.fit_json import to_dict

        return to_dict(self)

    def to_json(self, path: str | Path) -> None:
        """Write the fit, whole or not at all."""
        write_json_atomic(Path(path), self.as_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> FitResult:
        """Read a fit back: predictions are bit-equal; profiles need the data and are not available.

        Raises `UserError` for a file that is not a fit written by this package.
        """
        from analysis.fit_json import read

        return read(Path(path))


def failed(law: Law, notes: list[Note], points: int, excluded: list[dict[str, str]] | None = None) -> FitResult:
    """The result of a fit that was not possible; its notes say why."""
    assert has(notes, "too_few_points") or any(entry.severity == "error" for entry in notes)
    size = len(law.params)
    return FitResult(
        law=law,
        theta=np.full(size, np.nan),
        means=dict.fromkeys(law.inputs, 0.0),
        y_mean=0.0,
        theta_cov=np.full((size, size), np.nan),
        intervals=dict.fromkeys(law.params, (None, None)),
        rss=float("nan"),
        dof=points - size,
        points=points,
        notes=notes,
        status=Status.FAILED,
        excluded=excluded or [],
    )


def format_interval(low: float | None, high: float | None, digits: int = 4) -> str:
    """[lo, hi] with an open end shown as such."""
    left = "(open" if low is None else f"[{low:.{digits}g}"
    right = "open)" if high is None else f"{high:.{digits}g}]"
    return f"{left}, {right}"


def _plus(value: float | None, shift: float) -> float | None:
    return None if value is None else value + shift
