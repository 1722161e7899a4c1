"""The number of latents whose codes describe activations in the fewest bits, at equal error (arXiv 2410.11179).

More latents need fewer active ones for the same error, and more bits to say which. So bits per token at one error have
a minimum in n, unless the grid ends before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd

from analysis.runs.table import RunTable
from harness.errors import UserError

BITS = "quality.mdl.bits_per_token"
LEAST_SIZES = 3
"""Sizes n that must reach an error: fewer show no minimum."""
_LEVELS = 7


@dataclass(frozen=True)
class DescriptionLength:
    """Bits per token at one error, against n."""

    sae: str
    fvu: float
    n: tuple[int, ...]
    """The sizes with runs on both sides of the error, ascending."""
    k: tuple[float, ...]
    """Active latents of each size at this error."""
    bits: tuple[float, ...]
    """Of each size; geometric mean over seeds."""
    by_seed: tuple[int, ...]
    """The n with the fewest bits for each seed that has all these sizes."""

    @property
    def best(self) -> int:
        return self.n[int(np.argmin(self.bits))]

    @property
    def inside(self) -> bool:
        """Whether larger and smaller sizes take more bits, so that the grid holds a minimum."""
        return self.n[0] < self.best < self.n[-1]


def description_lengths(table: RunTable, levels: Sequence[float] = ()) -> list[DescriptionLength]:
    """One entry per architecture and error.

    Args:
        levels: Errors (fvu). By default some that at least `LEAST_SIZES` sizes reach, evenly spaced in ln(fvu).

    Raises `UserError` if no run has the metric `mdl`, or if no level is reached by enough sizes. Along the runs of one
    size, ln(bits) and ln(k) are linear in ln(fvu) between neighbours, and are not extrapolated.
    """
    if BITS not in table.frame:
        raise UserError(f"{table.name}: no run has {BITS}; run `harness.evaluate … --metrics mdl` first")
    frame = table.frame[table.frame[BITS].notna()]
    roles = {name: table.roles[name] for name in ("n", "k", "loss")}
    frame = frame.assign(n=frame[roles["n"]], k=np.log(frame[roles["k"]].astype(float)))
    frame = frame.assign(fvu=np.log(frame[roles["loss"]].astype(float)), bits=np.log(frame[BITS].astype(float)))
    found = []
    for sae, part in frame.groupby(frame["sae"].astype(str) if "sae" in frame else np.full(len(frame), "")):
        curves = _by_size(part)
        seeds = [_by_size(runs) for _, runs in part.groupby("seed")] if "seed" in part else []
        for level in np.log(levels) if len(levels) else _reached(curves):
            points = _at(curves, level)
            if len(points) < LEAST_SIZES:
                continue
            sizes = tuple(sorted(points))
            k, bits = (tuple(float(np.exp(points[n][place])) for n in sizes) for place in (0, 1))
            alone = [found for found in (_at(curves, level) for curves in seeds) if set(sizes) <= set(found)]
            best = tuple(min(sizes, key=lambda n, own=own: own[n][1]) for own in alone)
            found.append(DescriptionLength(str(sae), float(np.exp(level)), sizes, k, bits, best))
    if not found:
        raise UserError(
            f"{table.name}: no fvu is reached by {LEAST_SIZES} sizes n, each with runs of smaller and of larger fvu; "
            "train more values of k"
        )
    return found


def _by_size(runs: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """n → ln k, ln fvu and ln bits, by rising fvu; repeats of a k are averaged."""
    return {
        int(cast(Any, n)): part.groupby("k", as_index=False)[["fvu", "bits"]].mean().sort_values("fvu")
        for n, part in runs.groupby("n")
    }


def _at(curves: dict[int, pd.DataFrame], level: float) -> dict[int, tuple[float, float]]:
    """n → (ln k, ln bits) at ln(fvu) = `level`, for the sizes that have it between two runs."""
    found = {}
    for n, curve in curves.items():
        fvu = curve["fvu"].to_numpy()
        if len(fvu) > 1 and fvu[0] <= level <= fvu[-1]:
            found[n] = (float(np.interp(level, fvu, curve["k"])), float(np.interp(level, fvu, curve["bits"])))
    return found


def _reached(curves: dict[int, pd.DataFrame]) -> list[float]:
    """Levels of ln(fvu) that enough sizes have, inside the range of those."""
    ends = [(float(curve["fvu"].min()), float(curve["fvu"].max())) for curve in curves.values()]
    if len(ends) < LEAST_SIZES:
        return []
    low = sorted(begin for begin, _ in ends)[LEAST_SIZES - 1]
    high = sorted((end for _, end in ends), reverse=True)[LEAST_SIZES - 1]
    return list(np.linspace(low, high, _LEVELS)) if low <= high else []
