"""`FitResult`: what `fit` returns. A fitted law with its data, notes, status and JSON form."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.fits import fit_json
from analysis.fits.fitted import FittedLaw
from analysis.fits.influence import Influence
from analysis.fits.intervals import critical_t, noiseless, profile, size_profile, value_profile, wald
from analysis.fits.nested import holdout_error, last_slope_error
from analysis.fits.problem import Problem
from analysis.fits.status import Status
from analysis.format import Interval, interval
from analysis.laws.catalogue import LAWS
from analysis.laws.law import Array, Law
from analysis.notes import Note, any_error
from harness.errors import UserError
from harness.files import write_json_atomic


@dataclass(kw_only=True)
class FitResult(FittedLaw):
    """What `fit` returns."""

    notes: list[Note]
    status: Status
    ci: str = "profile"
    """`profile`, `wald` or `bootstrap`."""
    robust: str | None = None
    """The robust loss and its settings; None for least squares."""
    reached: float = 1.0
    """Share of the starts that reached this optimum."""
    starts: int = 0
    nested: list[dict[str, Any]] = field(default_factory=list)
    """Comparison with simpler forms: law, params, rss_log, aicc, delta_aicc, holdout."""
    influences: list[Influence] = field(default_factory=list, repr=False)
    """What the fit would be without each cell, the most influential first; empty after `from_json`."""
    regime: str = ""
    """`converged`, `fixed tokens` or `mixed`; empty if it is not recorded or the law is one in tokens."""
    excluded: list[dict[str, str]] = field(default_factory=list)
    """Every run that did not enter: run, reason."""
    data_hash: str = ""
    """sha256 of the law's name and of the numbers that were fitted."""
    problem: Problem | None = field(default=None, repr=False)
    """The data behind the fit; None after `from_json`."""
    runs: list[str] = field(default_factory=list, repr=False)
    """Name of the run behind each point, in the order of `problem`."""
    inputs: dict[str, Array] = field(default_factory=dict, repr=False)
    """The fitted inputs by role, in the order of the table."""
    y: Array = field(default_factory=lambda: np.empty(0), repr=False)
    """The fitted losses, in the order of the table."""
    weights: Array | None = field(default=None, repr=False)
    """Their weights; None if all are one."""

    def contrast(self, weights: Mapping[str, float]) -> tuple[float, float | None, float | None]:
        """Σ weight·coefficient with its interval, e.g. {"beta_n": 1, "gamma": ln k} is the local slope in n.

        The coefficients of `law.exp_params` enter as logarithms. The interval is a profile if the fit used profiles and
        still has its data, else Wald's.
        """
        matrix, offset = self.raw_map()
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

        The reducible part is the one term that decays along that input: slope("n", at={"k": 64}) is β_n + γ ln 64. A
        term in tokens is left aside (except along tokens): the slope is that of converged runs.
        Raises `UserError` if there is no single such term or an input is missing in `at`.
        """
        floor = None if self.law.floor is None else self.law.terms[self.law.floor]
        aside = [t for t in self.law.terms if along != "d" and any("d" in entry.monomial for entry in t)]
        matches = [
            t for t in self.law.terms if any(along in entry.monomial for entry in t) and t not in (floor, *aside)
        ]
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

    def forecast(self, frame: pd.DataFrame | Mapping[str, Any], kind: str = "mean") -> pd.DataFrame:
        """`predict`, with profile bands at points outside the data: there Wald's cover less than they say.

        A fit without its data (read from JSON), or with other intervals than profiles, gives `predict`; where that has
        no band, there is none. Raises `UserError` as `predict` does.
        """
        band = self.predict(frame, kind)
        if self.problem is None or self.ci != "profile" or self.dof < 1 or noiseless(self.rss, self.points):
            return band
        inputs = self._inputs(frame)
        phi = self._features(inputs)
        spread = self.variance / self._relative_weight(inputs) if kind == "new_run" else np.zeros(len(band))
        for i in np.flatnonzero((band["extrapolation"] > 0) & band["lo"].notna()):
            ends = value_profile(self.problem, self.theta, self.rss, phi[:, [i]], self.level)
            log_y, new = math.log(band["value"].iloc[i]), critical_t(self.dof, self.level) * math.sqrt(spread[i])
            for name, end, sign, opened in (("lo", ends[0], -1, 0.0), ("hi", ends[1], 1, math.inf)):
                half = 0.0 if end is None else math.hypot(end + self.y_mean - log_y, new)
                band.loc[i, name] = opened if end is None else math.exp(log_y + sign * half)
        return band

    def size_interval(self, inputs: Mapping[str, float]) -> Interval | None:
        """Where `law.scale_input` may lie at which the law has the value that it has at `inputs`, by profile.

        None where `forecast` gives no profile: without its data, with other intervals, or without residuals.
        """
        if self.problem is None or self.ci != "profile" or self.dof < 1 or noiseless(self.rss, self.points):
            return None
        name = self.law.scale_input

        def features(log_size: float) -> Array:
            return self._features({**inputs, name: math.exp(log_size)})

        ends = size_profile(self.problem, self.theta, self.rss, features, math.log(inputs[name]), self.level)
        low, high = (None if end is None else math.exp(end) for end in ends)
        return low, high

    def holdout(self, by: str | None = None, top: int = 1) -> dict[str, float | None]:
        """How well the law predicts the `top` largest values of `by` if it is fitted without them.

        Returns root-mean-square errors of ln(loss): `error` of this law, `no_floor` of its form without a floor (if it
        has one), `last_slope` of the last slope of each series, continued; None if too little is left. Raises
        `UserError` without data or if `by` is not an input.
        """
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

    def residuals(self) -> pd.DataFrame:
        """One row per fitted point: run, row of the table, y, fitted, residual (ln y − ln fitted)."""
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

    # -- showing and storing ------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """The law, its parameters with intervals, and the notes, as text."""
        lines = [f"{self.law.name}: y = {self.law.formula}", f"status: {self.status.value}"]
        for name, value in self.values.items():
            lines.append(f"  {name:<8} {value: .6g}   {interval(*self.intervals[name], digits=4)}")
        if self.dof > 0:
            lines.append(f"  residuals {100 * math.sqrt(self.variance):.2g} % over {self.sample()}")
        if self.influences:
            most = self.influences[0]
            far = f"{most.shift:.2g} half widths away"
            lines.append(f"  most influential cell: {most.where}; without it {most.values} (up to {far})")
        lines.extend(str(entry) for entry in self.notes)
        return "\n".join(lines)

    def sample(self) -> str:
        """How much was fitted: "18 runs, 12 dof", with the points if they are those of curves."""
        runs = len(set(self.runs))
        points = f" ({self.points} points)" if 0 < runs < self.points else ""
        return f"{runs or self.points} runs{points}, {self.dof} dof"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        notes = "".join(f"<li>{html.escape(str(entry))}</li>" for entry in self.notes)
        head = f"<p><b>{self.law.name}</b>: y = {html.escape(self.law.formula)} — status {self.status.value}</p>"
        return head + self.params.to_html(na_rep="open") + f"<ul>{notes}</ul>"

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return fit_json.content_of(vars(self), self.values, self.cov)

    def to_json(self, path: str | Path) -> None:
        """Write the fit, whole or not at all."""
        write_json_atomic(Path(path), self.as_dict())

    @classmethod
    def from_json(cls, path: str | Path) -> FitResult:
        """Read a fit back. Its predictions are bit-equal; profiles need the data and are not available.

        Raises `UserError` for a file that is not a fit written by this package.
        """
        return cls(**fit_json.read(Path(path)))


def failed(law: Law, notes: list[Note], points: int, excluded: list[dict[str, str]] | None = None) -> FitResult:
    """The result of a fit that was not possible; its notes say why."""
    assert any_error(notes)
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


def _plus(value: float | None, shift: float) -> float | None:
    return None if value is None else value + shift
