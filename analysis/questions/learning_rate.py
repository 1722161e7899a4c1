"""The best learning rate at each n, from a sweep over learning rates, and its slope in n."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.notes import Note
from analysis.questions.paired import PairedErrors, contrast
from analysis.runs.populations import at_best_rate
from analysis.runs.table import RunTable
from harness.errors import UserError

__all__ = ["BestRates", "at_best_rate", "best_rates"]


@dataclass
class BestRates:
    """Per (n, k): the learning rate with the lowest loss, interpolated if it is bracketed; and lr ∝ n^p."""

    rates: pd.DataFrame
    """n, k, lr, loss, bracketed, grid_lr (the best rate that was run), as_good (other rates that the held-out
    sample and repeats do not tell from it; None if unknown)."""
    law: FitResult | None
    """lr = D0·n^p over the bracketed rates (law `monomial`); None with fewer than three sizes."""
    notes: list[Note]


def best_rates(table: RunTable, errors: PairedErrors | None = None) -> BestRates:
    """The best rate of every n and k: the vertex of a parabola in ln(lr) through the best rate and its neighbours.

    A best rate at the edge of the rates that were tried is not bracketed and does not enter the slope (note
    `isoflop_edge`). Raises `UserError` if the table has no learning rates.

    Args:
        errors: Paired errors of the table; then `as_good` counts the other rates of the cell whose loss is not higher
            beyond its 95 % interval.
    """
    if "lr" not in table.roles or not np.any(np.isfinite(table.values("lr"))):
        raise UserError(f"{table.name}: no learning rates are recorded; name their column with --lr")
    table = table.use("n", "k", "loss")
    frame = pd.DataFrame({role: table.values(role) for role in ("n", "k", "lr", "loss")})
    frame["run"] = table.column("run").astype(str).to_numpy()
    frame = frame[np.isfinite(frame["lr"]) & (frame["lr"] > 0)]
    means = frame.groupby(["n", "k", "lr"], as_index=False)[["loss"]].mean()
    rows = []
    for (n, k), part in means.groupby(["n", "k"]):
        part = part.sort_values("lr")
        x, y = np.log(part["lr"].to_numpy()), np.log(part["loss"].to_numpy())
        i = int(np.argmin(y))
        row = {"n": n, "k": k, "grid_lr": float(np.exp(x[i])), "lr": float(np.exp(x[i])), "loss": float(np.exp(y[i]))}
        row["bracketed"] = bool(0 < i < len(x) - 1)
        row["as_good"] = None if errors is None else _as_good(frame[(frame["n"] == n) & (frame["k"] == k)], errors)
        if row["bracketed"]:
            c, b, a = np.polynomial.polynomial.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
            row["lr"], row["loss"] = float(np.exp(x[i] - b / (2 * a))), float(np.exp(c - b * b / (4 * a)))
        rows.append(row)
    rates = pd.DataFrame(rows, columns=["n", "k", "lr", "loss", "bracketed", "grid_lr", "as_good"])
    good = rates[rates["bracketed"].astype(bool)]
    notes = []
    if len(good) < len(rates):
        text = (
            f"{len(rates) - len(good)} of {len(rates)} cells have their best learning rate at the edge of those tried"
        )
        notes.append(Note("isoflop_edge", "warning", text, "add learning rates beyond the edge"))
    return BestRates(rates, _law(good), notes)


def _as_good(part: pd.DataFrame, errors: PairedErrors) -> int | None:
    """How many rates of one cell, other than the best, are not worse beyond their interval; None if not paired."""
    by_rate = [(float(np.log(runs["loss"]).mean()), list(runs["run"])) for _, runs in part.groupby("lr")]
    by_rate.sort(key=lambda entry: entry[0])
    best, best_runs = by_rate[0]
    ends = [errors.interval(contrast(runs, best_runs), loss - best) for loss, runs in by_rate[1:]]
    return None if any(end is None for end in ends) else sum(1 for end in ends if end is not None and end[0] <= 0)


def _law(rates: pd.DataFrame) -> FitResult | None:
    if rates["n"].nunique() < 3:
        return None
    points = RunTable(rates[["n", "lr"]].copy(), {"n": "n", "loss": "lr"}, name="best learning rates")
    result = fit(points, "monomial", weights="none")
    return None if result.status is Status.FAILED else result
