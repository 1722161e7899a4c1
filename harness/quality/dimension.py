"""Dimension of the activations themselves: how many directions they use, and how many they have near each row.

It does not depend on the SAE. As a metric it is a column beside the figures of the SAEs that were trained on the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Shared
from harness.record.quality import Value

VERSION = 1
MOST_ROWS = 8192
"""Rows among which nearest neighbours are looked for. The estimate rises a little with their number."""
KEPT = 0.9
"""Share of the ratios that is used: the largest ones belong to rows far from all others (Facco et al. 2017)."""
_BLOCK = 1024


def participation_ratio(x: Float[Tensor, "rows d"]) -> float:
    """(Σλ)²/Σλ² over the eigenvalues of the covariance: d if all directions are used equally, 1 for a line."""
    x = x.double() - x.double().mean(dim=0)
    covariance = x.T @ x
    return float(covariance.trace() ** 2 / covariance.square().sum())


def neighbour_ratios(x: Float[Tensor, "rows d"]) -> Float64[Tensor, " distinct"]:
    """Distance of each row to its second nearest row over that to its nearest, ascending. Rows that occur twice are
    left out. Memory grows with rows·_BLOCK."""
    x = torch.unique(x.double(), dim=0)
    square = x.square().sum(dim=1)
    ratios = []
    for start in range(0, len(x), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(x)))
        distance = (square[block, None] + square - 2 * x[block] @ x.T).clamp_min(0)
        rows = torch.arange(block.stop - block.start)
        distance[rows, rows + start] = torch.inf
        nearest = distance.topk(2, dim=1, largest=False).values
        ratios.append((nearest[:, 1] / nearest[:, 0]).sqrt())
    ratio = torch.cat(ratios)
    return ratio[ratio.isfinite()].sort().values


def two_nn(x: Float[Tensor, "rows d"]) -> Value:
    """Intrinsic dimension by two nearest neighbours (Facco et al. 2017): the ratio μ of their distances has
    P(μ > m) = m^−dimension, whatever the density. A line through the origin is fitted to −ln P against ln m."""
    ratio = neighbour_ratios(x)
    count = len(ratio)
    kept = int(KEPT * count)
    if kept < 2:
        raise ValueError(f"two-NN needs three distinct rows or more, not {count}")
    survival = 1 - torch.arange(1, kept + 1, dtype=torch.float64) / count
    steps = ratio[:kept].log()
    slope = float(steps @ -survival.log() / (steps @ steps))
    return Value(slope, slope / math.sqrt(kept))


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    rows = shared.rows.x
    shared.progress.start("dimension", len(subjects))
    values = {"two_nn": two_nn(rows[:MOST_ROWS]), "participation_ratio": Value(participation_ratio(rows))}
    for number, subject in enumerate(subjects, 1):
        yield subject, Outcome(len(rows), values)
        shared.tick(number)
