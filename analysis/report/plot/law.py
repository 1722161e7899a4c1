"""Pictures of a fitted law: loss against n with bands, floors and extrapolation; residuals; profiles."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.fits.intervals import critical_f, profile_curve
from analysis.fits.result import FitResult
from analysis.notes import has
from analysis.report.plot.style import GREY, add_legend, k_bar, k_style, log_axes
from analysis.runs.table import RunTable
from harness.errors import UserError

Fits = Sequence[FitResult | tuple[float, FitResult]]
"""A fit of a law in n and k, or (k, fit) pairs of laws in n alone."""


def loss_against_n(
    ax: Axes, table: RunTable, fits: Fits = (), held_out: RunTable | None = None, extend: float = 1.0
) -> Axes:
    """Loss against n coloured by k, with the fitted law, its bands (mean, and lighter: a new run) and dotted floors.

    Args:
        held_out: Runs that the fits did not see, drawn hollow.
        extend: How far beyond the largest n to draw the law, as a factor; the part beyond the fitted runs is shaded.
    """
    n, k, loss = table.values("n"), table.values("k"), table.values("loss")
    unseen = np.empty((3, 0)) if held_out is None else np.stack([held_out.values(r) for r in ("n", "k", "loss")])
    levels = sorted({*k, *unseen[1]})
    for value in levels:
        style = k_style(levels, value)
        for (x, y), face in (((n[k == value], loss[k == value]), style["color"]), (_at(unseen, value), "white")):
            if len(x):
                ax.plot(x, y, linestyle="none", ms=5.5, mfc=face, zorder=3, **style)
    sizes = np.r_[n, unseen[0]]
    if len(sizes):
        grid = np.geomspace(sizes.min() / 1.1, sizes.max() * max(1.1, extend), 100)
        pairs = [(value, result) for value in levels for result in _fits_at(fits, value)]
        drawn = [_law(ax, result, value, grid, k_style(levels, value)["color"]) for value, result in pairs]
        _legend_of_law(ax, pairs, any(drawn), len(unseen[0]) > 0, grid[-1])
    _excluded(ax, table)
    beyond = sizes.max(initial=1.0) * 2.0 ** np.arange(1, np.floor(np.log2(extend)) + 1)
    log_axes(ax, "number of latents n", "held-out fvu", np.r_[sizes, beyond], powers_of_two=True)
    add_legend(ax)
    k_bar(ax, levels)
    return ax


def _at(runs: np.ndarray, k: float) -> tuple[np.ndarray, np.ndarray]:
    chosen = runs[1] == k
    return runs[0][chosen], runs[2][chosen]


def _fits_at(fits: Fits, k: float) -> list[FitResult]:
    """The fits that apply to one k."""
    pairs = [entry if isinstance(entry, tuple) else (k, entry) for entry in fits]
    return [result for value, result in pairs if value == k]


def _inputs(result: FitResult, n: np.ndarray, k: float) -> dict[str, np.ndarray]:
    """Arrays for a law in n (or x, which is n here) and k."""
    values = {"n": n, "x": n, "k": np.full(len(n), k)}
    if "d" in result.law.inputs:  # the runs that are drawn are those of their last tokens
        values["d"] = np.full(len(n), result.domain["d"][1])
    return {name: values[name] for name in result.law.inputs}


def _law(ax: Axes, result: FitResult, k: float, grid: np.ndarray, color: object) -> bool:
    """Draw one curve with its bands and floor; True if it has bands."""
    inputs = _inputs(result, grid, k)
    mean, new = (result.predict(inputs, kind) for kind in ("mean", "new_run"))
    ax.plot(grid, mean["value"], color=color, lw=1.4)
    banded = result.dof > 0 and bool(np.all(np.isfinite(new[["lo", "hi"]])))
    if banded:
        for band, alpha in ((new, 0.12), (mean, 0.25)):
            ax.fill_between(grid, band["lo"], band["hi"], color=color, alpha=alpha, lw=0)
    floor = result.floor(inputs)
    if not has(result.notes, "floor_not_identified") and floor[0] > 0.1 * mean["value"].min():
        ax.plot(grid, floor, color=color, lw=1.1, ls=":")
    return banded


def _legend_of_law(ax: Axes, pairs: list[tuple[float, FitResult]], bands: bool, hollow: bool, end: float) -> None:
    if not pairs:
        return
    if bands:
        level = f"{100 * pairs[0][1].level:g} %"
        for name, alpha in (("the mean", 0.35), ("a new run", 0.12)):
            ax.fill_between([], [], [], color="0.2", alpha=alpha, lw=0, label=f"{level} band of {name}")
    if hollow:
        ax.plot([], [], "o", mfc="white", mec="0.3", label="hollow: not fitted")
    fitted = max(result.domain[result.law.scale_input][1] for _, result in pairs)
    if end > 1.2 * fitted:
        ax.axvspan(fitted, end, facecolor="0.93", edgecolor="0.75", hatch="///", lw=0, zorder=0, label="extrapolated")


def _excluded(ax: Axes, table: RunTable) -> None:
    """Draw the excluded runs that have n and a loss as grey crosses, one marker per reason."""
    out = table.excluded
    columns = [table.roles[role] for role in ("n", "loss")]
    if not len(out) or not set(columns) <= set(out):
        return
    x, y = (pd.to_numeric(out[column], errors="coerce").astype(float) for column in columns)
    usable = (x > 0) & (y > 0) & np.isfinite(y)
    same = out["sae"].isin(table.frame["sae"].unique()) if "sae" in out and "sae" in table.frame else True
    reasons = out["reason"].where(usable & same)
    for marker, (reason, count) in zip("x+1234", reasons.value_counts().items(), strict=False):
        chosen = reasons == reason
        text = textwrap.fill(f"left out ({count}): {reason}", 46)
        ax.plot(x[chosen], y[chosen], marker, color=GREY, ms=6, label=text)


def residuals_against_n(ax: Axes, table: RunTable, fits: Fits) -> Axes:
    """Residuals of ln(loss) in per cent against n."""
    n, k, loss = table.values("n"), table.values("k"), table.values("loss")
    levels = sorted(set(k))
    for value in levels:
        for result in _fits_at(fits, value):
            chosen = k == value
            fitted = result.log_value(_inputs(result, n[chosen], value))
            shift = 1.03 ** (levels.index(value) - (len(levels) - 1) / 2)
            style = k_style(levels, value)
            ax.plot(n[chosen] * shift, 100 * (np.log(loss[chosen]) - fitted), linestyle="none", ms=4.5, **style)
    ax.axhline(0, color="0.4", lw=0.9)
    reach = max(abs(edge) for edge in ax.get_ylim())
    ax.set_ylim(-reach, reach)
    ax.set_ylabel("residual [%]")
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def profile(ax: Axes, result: FitResult, name: str, points: int = 13) -> Axes:
    """√F with one parameter held (solid), Wald's straight lines (dashed), and the ends of the interval (dotted).

    Args:
        points: Number of values on either side at which √F is computed.

    Raises `UserError` for a fit without its runs (read from JSON).
    """
    if result.problem is None or result.dof < 1:
        raise UserError("a profile needs the fitted runs: fit the table again (a fit read from JSON has none)")
    row, offset = result.coefficient(name)
    reported = np.exp if name in result.law.exp_params else np.asarray
    centre, se = float(row @ result.theta), result.coefficient_se(name)
    critical = float(np.sqrt(critical_f(result.dof, result.level)))
    reach = [_reach(end, centre + offset, name in result.law.exp_params) for end in result.intervals[name]]
    wide = 2.0 * critical * se if 0 < se < 1 else 1.0
    below, above = np.linspace(-(reach[0] or wide), 0.0, points), np.linspace(0.0, reach[1] or wide, points)
    value = centre + np.r_[below, above[1:]]
    root = profile_curve(result.problem, result.theta, result.rss, row, value)
    ax.plot(reported(value + offset), root, color="black", lw=1.4)
    if np.isfinite(se) and se > 0:
        ax.plot(reported(value + offset), np.abs(value - centre) / se, color="0.5", lw=1.0, ls="--")
    ax.axhline(critical, color="#d55e00", lw=1.0)
    for end in result.intervals[name]:
        if end is not None:
            ax.axvline(end, color="#d55e00", lw=1.0, ls=":")
    ax.set_ylim(0, 1.6 * critical)
    ax.set_xlabel(name)
    ax.set_ylabel("√F")
    ax.locator_params(axis="x", nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _reach(end: float | None, raw: float, exponentiated: bool) -> float | None:
    """The distance from the estimate to draw on the side of `end`; None for an open end."""
    if end is None or (exponentiated and end <= 0):
        return None
    return 1.4 * abs((np.log(end) if exponentiated else end) - raw)
