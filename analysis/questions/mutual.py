"""What mutual feature regularisation (arXiv 2411.01220) does to the loss, and to the features that SAEs share.

SAEs are compared with those of the same seeds that trained without it. Peers share features because they were drawn
together; whether the features are less a matter of chance shows in SAEs that were no peers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.format import Interval
from analysis.questions.paired import mean_difference, paired_errors
from analysis.questions.seeds import compared
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.record import names

WEIGHT, SEEDS = "train.mfr_weight", "train.mfr_seeds"


@dataclass(frozen=True)
class Mutual:
    """SAEs of one sort and one weight of the regulariser."""

    cell: str
    weight: float
    runs: int
    ratio: float
    """Their loss over that of the same seeds without it, of geometric means."""
    interval: Interval
    """95 %: held-out documents, paired, and what the ratio differs by between seeds, as if peers were independent."""
    peers: float | None
    """Mean, over the rows of both dictionaries, of the largest cosine with a row of the other; between peers."""
    strangers: float | None
    """The same between SAEs that were not peers, with the regulariser …"""
    without: float | None
    """… and without it."""
    chance: float | None
    """The same of random rows and a dictionary."""


def mutual(table: RunTable) -> list[Mutual]:
    """One entry per architecture, n, k and weight above 0. Raises `UserError` if no seed trained with and without."""
    table = table.use("loss")
    frame = table.frame
    if WEIGHT not in frame or "seed" not in frame:
        raise UserError(f"{table.name}: no run has {WEIGHT}; the study mfr has some")
    keys = [name for name in ("sae", "n_experts", table.roles.get("n", ""), table.roles.get("k", "")) if name in frame]
    frame = frame.assign(_log=np.log(table.values("loss")))
    weight = pd.to_numeric(frame[WEIGHT], errors="coerce").fillna(0.0)
    found = []
    for key, part in frame.groupby(keys, dropna=False):
        plain = part[weight[part.index] == 0].drop_duplicates("seed").set_index("seed")
        texts = (f"{value:g}" if isinstance(value, int | float) else str(value) for value in key)
        cell = ", ".join(f"{name}={text}" for name, text in zip(keys, texts, strict=True))
        for value, drawn in part[weight[part.index] > 0].groupby(weight):
            both = drawn[drawn["seed"].isin(plain.index)]
            if len(both):
                found.append(_entry(table, cell, float(value), both, plain.loc[both["seed"]]))
    if not found:
        raise UserError(f"{table.name}: no seed trained both with {WEIGHT}=0 and with another weight, all else equal")
    return found


def _entry(table: RunTable, cell: str, weight: float, drawn: pd.DataFrame, plain: pd.DataFrame) -> Mutual:
    run = table.roles["run"]
    apart = drawn["_log"].to_numpy() - plain["_log"].to_numpy()
    errors = paired_errors(table)
    if errors is not None:
        # `interval` gives each run noise of its own; half of the variance of a difference is that of one
        sd = float(apart.std(ddof=1)) / math.sqrt(2) if len(apart) > 1 else None
        errors = replace(errors, repeat_sd=sd, repeat_dof=len(apart) - 1)
    log, ends = mean_difference(errors, drawn.set_index(run)["_log"], plain.set_index(run)["_log"])
    pairs = list(itertools.combinations(drawn.to_dict("records"), 2))
    are_peers = [str(a[SEEDS]) == str(b[SEEDS]) for a, b in pairs]
    peers = [pair for pair, together in zip(pairs, are_peers, strict=True) if together]
    strangers = [pair for pair, together in zip(pairs, are_peers, strict=True) if not together]
    without = list(itertools.combinations(plain.to_dict("records"), 2))
    chance = _cosines(table, without)
    return Mutual(
        cell=cell,
        weight=weight,
        runs=len(drawn),
        ratio=math.exp(log),
        interval=(None, None) if ends is None else (math.exp(ends[0]), math.exp(ends[1])),
        peers=_mean(mean for mean, _ in _cosines(table, peers)),
        strangers=_mean(mean for mean, _ in _cosines(table, strangers)),
        without=_mean(mean for mean, _ in chance),
        chance=_mean(random for _, random in chance),
    )


def _cosines(table: RunTable, pairs: Iterable[tuple[dict[Any, Any], dict[Any, Any]]]) -> list[tuple[float, float]]:
    """(mean of the largest cosine, that of random rows) of each pair whose weights are kept in one file."""
    found = []
    for pair in pairs:
        runs = [str(row[table.roles["run"]]) for row in pair]
        places = [table.directories[run] / names.SAE / names.WEIGHTS for run in runs if run in table.directories]
        if len(places) == 2 and all(place.is_file() for place in places):
            mean, _, chance = compared(*places)
            found.append((mean, chance))
    return found


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return float(np.mean(numbers)) if numbers else None
