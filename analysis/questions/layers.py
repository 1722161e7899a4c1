"""Runs at many hooks of one model: their figures side by side, and a law per layer: how fast the error falls with
width, beside the dimension of the activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from scipy.stats import permutation_test, rankdata

from analysis.fits.intervals import coefficient
from analysis.format import Interval
from analysis.laws.law import Array
from analysis.runs.table import RunTable
from harness.errors import UserError

DIMENSIONS = ("two_nn", "participation_ratio")
"""Of the metric `dimension`."""
LEAST_SIZES = 3
LEAST_LAYERS = 4
"""Fewer have no rank correlation worth a name."""


SUITE = ("fvu", "l0", "dead_frac", "quality.downstream.kl", "quality.downstream.delta_ce")
"""Figures of a suite, as far as its runs have them."""


def hooks(table: RunTable) -> list[str]:
    """The columns that tell the hooks of the runs apart. Raises `UserError` if all runs are of one hook."""
    frame = table.frame
    known = [name for name in ("model", "hook", "layer") if name in frame]
    apart = [name for name in known if frame[name].astype(str).nunique() > 1]
    if not apart:
        raise UserError(f"{table.name}: all runs are of one hook; train several, e.g. activations.layer=2,4,6")
    return apart


def suite(table: RunTable) -> pd.DataFrame:
    """One row per hook, architecture, n and k: means over repeats of `SUITE`."""
    frame = table.frame
    keys = [*hooks(table), *(name for name in ("sae", "n_latents", "k") if name in frame)]
    figures = [name for name in SUITE if name in frame]
    return frame.groupby(keys, as_index=False)[figures].mean()


@dataclass(frozen=True)
class LayerLaw:
    """fvu ∝ n^−exponent at one hook and one k, over the sizes that were trained."""

    place: str
    """The columns that tell hooks apart, e.g. `layer=4`."""
    sae: str
    k: float
    sizes: int
    exponent: float
    interval: Interval
    """95 %, from the scatter around the line."""
    dimensions: dict[str, float]
    """Of the rows at this hook, by name; empty if they were not measured."""


def layer_laws(table: RunTable) -> list[LayerLaw]:
    """One entry per hook, architecture and k with at least `LEAST_SIZES` sizes. Raises `UserError` if there is none."""
    frame, apart = table.frame, hooks(table)
    found = []
    keys = [*apart, *(name for name in ("sae",) if name in frame), table.roles["k"]]
    for key, part in frame.groupby(keys, sort=True):
        values = dict(zip(keys, cast("tuple[Any, ...]", key), strict=True))
        n = part[table.roles["n"]].to_numpy(dtype=float)
        if len(set(n)) < LEAST_SIZES:
            continue
        exponent, ends = falling(np.log(n), np.log(part[table.roles["loss"]].to_numpy(dtype=float)))
        columns = {name: f"quality.dimension.{name}" for name in DIMENSIONS}
        known = {name: part[column].dropna() for name, column in columns.items() if column in part}
        dimensions = {name: float(column.iloc[0]) for name, column in known.items() if len(column)}
        texts = [f"{values[name]:g}" if name == "layer" else str(values[name]) for name in apart]
        place = ", ".join(f"{name}={text}" for name, text in zip(apart, texts, strict=True))
        size = float(values[table.roles["k"]])
        found.append(LayerLaw(place, str(values.get("sae", "")), size, len(set(n)), exponent, ends, dimensions))
    if not found:
        raise UserError(f"{table.name}: no hook has {LEAST_SIZES} sizes n at one k")
    return found


def falling(log_n: Array, log_loss: Array) -> tuple[float, Interval]:
    """a of loss ∝ n^−a from a line through the logarithms, and its 95 % interval (open with two points)."""
    return coefficient(np.stack([np.ones(len(log_n)), -log_n], axis=1), log_loss, 1)


def rank_correlation(laws: Sequence[LayerLaw], name: str) -> tuple[float, float] | None:
    """(Spearman's ρ between the exponent and a dimension over hooks, two-sided p of a permutation test).

    `laws` are of one architecture and k. None for fewer than `LEAST_LAYERS` hooks with that dimension.
    """
    known = [law for law in laws if name in law.dimensions]
    if len(known) < LEAST_LAYERS:
        return None
    exponents, dimensions = (
        rankdata(values) for values in ([law.exponent for law in known], [law.dimensions[name] for law in known])
    )
    if len(set(exponents)) == 1 or len(set(dimensions)) == 1:
        return None

    def correlation(x: Array) -> float:
        return float(np.corrcoef(x, dimensions)[0, 1])

    tested = permutation_test((exponents,), correlation, permutation_type="pairings", n_resamples=9999, rng=0)
    return float(tested.statistic), float(tested.pvalue)
