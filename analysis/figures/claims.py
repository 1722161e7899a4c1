"""Claims of a paper, and what our runs say of each: shown, contradicted, or not to be told here, by stated rules.

Every rule reads 95 % intervals only:

- a *direction* is shown if the interval lies on the claimed side of 0 (of 1 for a ratio), contradicted if it lies on
  the other side, and cannot be told if it holds 0;
- *several steps* (an order) are shown if each is, contradicted if any is, and cannot be told otherwise;
- a *number* is contradicted if the interval does not hold it. It is shown if the interval holds it, does not hold 0 and
  is no wider than a stated tolerance to either side. Else it cannot be told.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from analysis.fits.intervals import coefficient, wald
from analysis.format import interval, number
from analysis.questions.paired import pooled_sd
from harness.errors import UserError


class Verdict(enum.StrEnum):
    """In the order in which they are listed."""

    CONTRADICTED = "contradicted"
    SHOWN = "shown"
    CANNOT = "cannot be told here"


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; None for an end that the data do not bound."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{number(self.value)} {interval(self.low, self.high)}"

    def side(self, of: float = 0.0) -> int:
        """1 or −1 if the interval lies above or below, 0 if it holds the value."""
        if self.low is not None and self.low > of:
            return 1
        return -1 if self.high is not None and self.high < of else 0


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what came out here."""

    statement: str
    published: str
    """The paper's number, or where it says so."""
    ours: str = ""
    verdict: Verdict = Verdict.CANNOT
    why: str = ""
    """The conditions under which our number holds, or what would be needed to tell."""

    def missing(self, why: str) -> Claim:
        """The claim without a verdict."""
        return replace(self, verdict=Verdict.CANNOT, why=why)

    def judged(self, verdict: Verdict, ours: str, where: str, needed: str) -> Claim:
        """The claim with a verdict; `where` says how ours was measured, `needed` what would tell if it did not."""
        return replace(
            self, ours=ours, verdict=verdict, why=f"{where}; {needed}" if verdict is Verdict.CANNOT else where
        )


def direction(estimate: Estimate, sign: int, of: float = 0.0) -> Verdict:
    """Whether the estimate lies above (`sign` 1) or below (−1) `of`."""
    side = estimate.side(of)
    return Verdict.CANNOT if side == 0 else Verdict.SHOWN if side == sign else Verdict.CONTRADICTED


def steps(estimates: Sequence[Estimate], sign: int, of: float = 0.0) -> Verdict:
    """Whether every estimate lies on the claimed side of `of`."""
    verdicts = {direction(estimate, sign, of) for estimate in estimates}
    if Verdict.CONTRADICTED in verdicts:
        return Verdict.CONTRADICTED
    return Verdict.SHOWN if verdicts == {Verdict.SHOWN} else Verdict.CANNOT


def equals(estimate: Estimate, published: float, tolerance: float) -> Verdict:
    """Whether the estimate is the published number."""
    if estimate.side(published) != 0:
        return Verdict.CONTRADICTED
    if estimate.low is None or estimate.high is None or estimate.side() == 0:
        return Verdict.CANNOT
    narrow = max(estimate.value - estimate.low, estimate.high - estimate.value) <= tolerance
    return Verdict.SHOWN if narrow else Verdict.CANNOT


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of independent values and its t interval; open for fewer than two."""
    each = np.asarray(values, dtype=float)
    se = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan
    return Estimate(float(each.mean()), *wald(float(each.mean()), se, len(each) - 1, 0.95))


def exponential(estimate: Estimate) -> Estimate:
    """exp of an estimate of a logarithm."""
    ends = (None if end is None else math.exp(end) for end in (estimate.low, estimate.high))
    return Estimate(math.exp(estimate.value), *ends)


def difference(frame: pd.DataFrame, column: str, first: pd.Series, second: pd.Series, cells: Sequence[str]) -> Estimate:
    """Mean of `column` where `first` holds minus its mean where `second` does.

    The noise is that between repeats of a cell (`cells` are the columns that make one), pooled over all of `frame`.
    """
    values = frame[column].astype(float)
    sd, dof = pooled_sd(values, [frame[name].astype(str) for name in cells])
    value = float(values[first].mean() - values[second].mean())
    if sd is None:
        return Estimate(value, None, None)
    return Estimate(value, *wald(value, sd * math.sqrt(1 / int(first.sum()) + 1 / int(second.sum())), dof, 0.95))


def slope(frame: pd.DataFrame, column: str, along: str, beside: Sequence[str], log: bool = True) -> Estimate:
    """Slope of ln(`column`) (or `column`, if not `log`) in ln(`along`) by least squares.

    `beside` are further columns of the regression: logarithms of numbers, indicators of words. Open with too few rows.
    """
    frame = frame[frame[column].notna()]
    y = frame[column].to_numpy(dtype=float)
    parts = [np.ones((len(frame), 1)), np.log(frame[[along]].to_numpy(dtype=float))]
    for name in beside:
        if pd.api.types.is_numeric_dtype(frame[name]):
            parts.append(np.log(frame[[name]].to_numpy(dtype=float)))
        else:
            parts.append(pd.get_dummies(frame[name], drop_first=True).to_numpy(dtype=float))
    x = np.hstack(parts)
    if len(y) <= x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
        return Estimate(math.nan, None, None)
    value, ends = coefficient(x, np.log(y) if log else y, 1)
    return Estimate(value, *ends)


def claims_table(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table: contradicted ones first, then what was shown, then what cannot be told."""
    ordered = sorted(claims, key=lambda claim: list(Verdict).index(claim.verdict))
    counts = ", ".join(f"{sum(c.verdict is v for c in claims)} {v.value}" for v in Verdict)
    lines = [
        f"{len(claims)} claims: {counts}.",
        "",
        "| the paper says | here | verdict | how, or what would be needed |",
    ]
    lines.append("|---|---|---|---|")
    for claim in ordered:
        said = f"{claim.statement} ({claim.published})" if claim.published else claim.statement
        cells = [said, claim.ours or "–", f"**{claim.verdict.value}**", claim.why]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def put(text: str, paper: str, document: str, name: str) -> str:
    """The document with the text in the block of that paper. Raises `UserError` for a document without the block."""
    begin, end = f"<!-- claims of {paper}: begin -->", f"<!-- claims of {paper}: end -->"
    head, found, rest = document.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise UserError(f"{name} has no block for {paper}; add the lines {begin} and {end}")
    return f"{head}{begin}\n{text}\n{end}{tail}"
