"""How much of a dictionary another seed finds again: cosines of decoder rows of runs that differ only in their seed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from analysis.laws.law import Array
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.record import names

SHARED = 0.7
"""A latent is found again if a row of the other dictionary has a larger cosine with its own."""
_BLOCK = 1024
_ROWS = 2048
"""Most rows of a dictionary for which the nearest row of the other is looked for."""


@dataclass(frozen=True)
class SeedStability:
    """Of the first two seeds of a cell."""

    sae: str
    n: int
    k: float
    mean_cosine: float
    """Mean over rows of both dictionaries (at most `_ROWS` each) of the largest cosine with a row of the other."""
    shared: float
    """Share of rows whose largest cosine is above `SHARED`."""
    random_cosine: float
    """The same of random rows and a dictionary: what chance gives."""


def matched_cosine(first: Array, second: Array) -> Array:
    """Cosine of each row of `first` (n, d) with its nearest row of `second` (m, d); O(n·m·d) time, O(m) memory."""
    a, b = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (first, second))
    return np.concatenate([(a[start : start + _BLOCK] @ b.T).max(axis=1) for start in range(0, len(a), _BLOCK)])


def seed_stability(table: RunTable) -> list[SeedStability]:
    """One entry per cell with two seeds whose weights are kept in one file. Raises `UserError` for damaged weights."""
    frame = table.frame
    keys = ("sae", "n_experts", "n_latents", "k", "lr", "activations.layer", "train.mfr_weight")
    keys = [name for name in keys if name in frame]
    if "seed" not in frame or not keys:
        return []
    found = []
    for _, part in frame.groupby(keys, dropna=False):
        by_seed = part.drop_duplicates("seed").sort_values("seed")
        runs = [str(run) for run in by_seed[table.roles["run"]]]
        places = [table.directories[run] / names.SAE / names.WEIGHTS for run in runs if run in table.directories]
        places = [place for place in places if place.is_file()][:2]
        if len(places) == 2:
            row: Any = part.iloc[0]
            cosines = compared(*places)
            found.append(SeedStability(str(row["sae"]), int(row["n_latents"]), float(row["k"]), *cosines))
    return found


def compared(*places: Path) -> tuple[float, float, float]:
    """`mean_cosine`, `shared` and `random_cosine` of two files of weights. Raises `UserError` for a damaged one."""
    rows = [_decoder(place) for place in places]
    few = [each[:: -(-len(each) // _ROWS)] for each in rows]
    both = np.concatenate([matched_cosine(few[0], rows[1]), matched_cosine(few[1], rows[0])])
    random = np.random.default_rng(0).standard_normal(rows[1].shape, dtype=np.float32)
    chance = float(matched_cosine(random[: _ROWS // 8].astype(float), rows[0]).mean())
    return float(both.mean()), float((both > SHARED).mean()), chance


def _decoder(place: Path) -> Array:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return cast(Array, load_file(place)["W_dec"].astype(np.float32))
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{place} cannot be read ({error}); copy the run again") from None
