"""Differences between runs that were evaluated on the same held-out documents.

All runs of a store see the same held-out documents, so most of the error of one loss is the error of every other, and
it cancels in a difference. ln(fvu) = ln Σ error − ln Σ variance is linear in the documents to first order; its
covariance between runs is that of these influences, with documents as clusters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd

from analysis.fits.intervals import wald
from analysis.laws.law import Array
from analysis.notes import Note, note
from analysis.runs.heldout import influences
from analysis.runs.table import RunTable


@dataclass(frozen=True)
class PairedErrors:
    """The error that the finite held-out sample gives to the runs of a table, and their noise between repeats."""

    runs: tuple[str, ...]
    """Runs that keep their sums, all of the same documents."""
    influence: Array
    """(runs, documents), see `influences`."""
    repeat_sd: float | None
    """Standard deviation of ln(loss) between repeats of a cell; None without repeats."""
    repeat_dof: int
    repeated: tuple[str, ...] = ()
    """Architectures of the repeated cells."""

    @property
    def documents(self) -> int:
        return self.influence.shape[1]

    def sd(self, weights: Mapping[str, float]) -> float | None:
        """Standard error of Σ weight·ln(loss) over the held-out documents; None if a run keeps no sums."""
        if not set(weights) <= set(self.runs):
            return None
        row = {run: i for i, run in enumerate(self.runs)}
        total = sum(weight * self.influence[row[run]] for run, weight in weights.items())
        return self._scale * float(np.linalg.norm(total))

    def interval(self, weights: Mapping[str, float], value: float, level: float = 0.95) -> tuple[float, float] | None:
        """Interval of Σ weight·ln(loss), which is `value`: documents, and repeats where there are some.

        None if the runs cannot be paired.
        """
        sampling = self.sd(weights)
        if sampling is None or self.documents < 2:
            return None
        variance, dof = sampling**2, float(self.documents - 1)
        if self.repeat_sd is not None:
            repeats = self.repeat_sd**2 * sum(weight**2 for weight in weights.values())
            # Welch and Satterthwaite: the noise of repeats is known from few of them
            parts = variance**2 / dof + repeats**2 / self.repeat_dof
            variance += repeats
            dof = variance**2 / parts if parts > 0 else dof
        low, high = wald(value, math.sqrt(variance), max(1, int(dof)), level)
        return None if low is None or high is None else (low, high)

    @property
    def common(self) -> float:
        """Standard error of the mean ln(loss) of all runs: it moves the level of a law and nothing else."""
        return self._scale * float(np.linalg.norm(self.influence.mean(axis=0)))

    @property
    def own(self) -> float:
        """Root mean square error of one run's ln(loss) against the mean of all runs: it looks like scatter."""
        apart = self.influence - self.influence.mean(axis=0)
        return self._scale * float(np.sqrt(np.square(apart).sum(axis=1).mean()))

    @property
    def _scale(self) -> float:
        return math.sqrt(self.documents / max(1, self.documents - 1))

    def sentence(self) -> str:
        """What the finite held-out sample does to a law of these runs."""
        return (
            f"The held-out sample ({self.documents:,} documents or groups of them) moves all {len(self.runs)} losses "
            f"together by ± {100 * self.common:.2g} %, which changes the level of a law only, and each against the "
            f"others by ± {100 * self.own:.2g} % (one standard error)."
        )


def paired_errors(table: RunTable) -> PairedErrors | None:
    """Paired errors of the runs of a table; None if fewer than two keep sums of the same documents.

    Raises `UserError` for a damaged file.
    """
    runs, influence = influences(table)
    return with_repeats(table, runs, influence) if len(runs) > 1 else None


def with_repeats(table: RunTable, runs: Sequence[str], influence: Array) -> PairedErrors:
    """Paired errors of runs of a table whose `influence` (runs, documents) is known."""
    return PairedErrors(tuple(runs), influence, *_repeats(table))


def _repeats(table: RunTable) -> tuple[float | None, int, tuple[str, ...]]:
    """(pooled standard deviation of ln(loss) within cells, its degrees of freedom, architectures of the repeated
    cells); None, 0 and none without repeats."""
    frame = table.frame
    keys = [
        name
        for name in ("sae", *(table.roles.get(role, "") for role in ("experts", "n", "k", "lr", "d")))
        if name in frame
    ]
    if not keys:
        return None, 0, ()
    log_loss = pd.Series(np.log(table.values("loss")), index=frame.index)
    cells = [frame[key].astype(str) for key in keys]
    sd, dof = pooled_sd(log_loss, cells)
    if sd is None:
        return None, 0, ()
    repeated = log_loss.groupby(cells).transform("size") > 1
    return sd, dof, tuple(sorted(set(frame["sae"][repeated]))) if "sae" in frame else ()


def pooled_sd(values: pd.Series, cells: Sequence[pd.Series]) -> tuple[float | None, int]:
    """(standard deviation of values within cells, pooled; its degrees of freedom); (None, 0) without repeats."""
    groups = values.groupby(list(cells))
    dof = len(values) - groups.ngroups
    square = float(np.square(values - groups.transform("mean")).sum())
    return (math.sqrt(square / dof), dof) if dof > 0 else (None, 0)


def rises(table: RunTable, errors: PairedErrors | None) -> list[Note]:
    """A note if, of two neighbouring sizes, the larger n has the higher loss beyond the 95 % interval; else no note.

    Only pairs that can be paired count, so that noise of the held-out sample is not called a rise.
    """
    if errors is None or not (table.has("n") and table.has("k")):
        return []
    frame, run, n = table.frame, table.roles["run"], table.roles["n"]
    frame = frame.assign(_log=np.log(table.values("loss")))
    keys = [name for name in ("sae", table.roles.get("experts", ""), table.roles["k"]) if name in frame]
    found = []
    for _, part in frame.groupby(keys):
        sizes = [(float(cast(Any, size)), cell) for size, cell in part.groupby(n)]
        for (small, fewer), (large, more) in itertools.pairwise(sizes):
            _, ends = mean_difference(errors, more.set_index(run)["_log"], fewer.set_index(run)["_log"])
            if ends is not None and ends[0] > 0:
                kind = ", ".join(str(part[key].iloc[0]) for key in keys)
                found.append(f"{kind}: n = {large:,.0f} against {small:,.0f}")
    if not found:
        return []
    text = f"{len(found)} larger SAE(s) are worse than the next smaller one, e.g. {found[0]}"
    return [note("not_monotone", "warning", text)]


def mean_difference(
    errors: PairedErrors | None, first: pd.Series, second: pd.Series
) -> tuple[float, tuple[float, float] | None]:
    """Mean ln(loss) of the first runs minus that of the second, each by run, and its 95 % interval; None if they cannot
    be paired."""
    value = float(first.mean() - second.mean())
    weights = contrast(first.index.astype(str).tolist(), second.index.astype(str).tolist())
    return value, None if errors is None else errors.interval(weights, value)


def contrast(first: list[str], second: list[str]) -> dict[str, float]:
    """Weights of mean ln(loss) of the first runs minus that of the second."""
    weights = {run: 1 / len(first) for run in first}
    for run in second:
        weights[run] = weights.get(run, 0.0) - 1 / len(second)
    return weights
