"""Two architectures with the same n and k, by what their errors cost the language model: paired by document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from analysis.fits.intervals import wald
from analysis.format import Interval
from analysis.questions.paired import contrast, paired_errors
from analysis.runs.heldout import downstream_sums
from analysis.runs.table import RunTable

KL = "quality.downstream.kl"


@dataclass(frozen=True)
class QualityPair:
    """How the second architecture compares with the first. Intervals hold the finite text, and repeats where there are
    some."""

    first: str
    second: str
    n: int
    k: float
    kl_ratio: float
    """KL of the second over that of the first; means of ln KL over seeds."""
    kl_interval: Interval
    delta_ce: float
    """CE of the second minus that of the first, nats per token."""
    delta_ce_interval: Interval


def quality_pairs(table: RunTable) -> list[QualityPair]:
    """Every pair of architectures with the same n and k whose losses were measured on the same documents. TopK comes
    first, then by name. Raises `UserError` for a damaged file."""
    if KL not in table.frame:
        return []
    roles = {**table.roles, "loss": KL, "loss_se": f"{KL}_se"}
    table = RunTable(table.frame, roles, name=table.name, directories=table.directories)
    errors = paired_errors(table)
    if errors is None:
        return []
    run = table.roles["run"]
    frame = table.frame[table.frame[run].astype(str).isin(errors.runs)]
    found = []
    for (n, k), part in frame.groupby(["n_latents", "k"], sort=True):  # pyright: ignore
        kinds = sorted(set(part["sae"].astype(str)), key=lambda name: (name != "topk", name))
        for second in kinds[1:]:
            groups = [part[part["sae"].astype(str) == kind] for kind in (kinds[0], second)]
            names = [group[run].astype(str).tolist() for group in groups]
            logs = [float(np.log(group[KL].astype(float)).mean()) for group in groups]
            weights = contrast(names[1], names[0])
            ends = errors.interval(weights, logs[1] - logs[0])
            ratio = None if ends is None else (math.exp(ends[0]), math.exp(ends[1]))
            size = int(cast(Any, n)), float(cast(Any, k))
            both = (math.exp(logs[1] - logs[0]), ratio or (None, None), *_delta_ce(table, weights))
            found.append(QualityPair(kinds[0], second, *size, *both))
    return found


def _delta_ce(table: RunTable, weights: Mapping[str, float]) -> tuple[float, Interval]:
    """Σ weight·CE over runs, per token, and its 95 % interval over documents."""
    total: Any = 0.0
    tokens: Any = 0.0
    for run, weight in weights.items():
        kept = downstream_sums(table.directories[run])
        assert kept is not None  # else the run could not be paired
        tokens = kept.sums["tokens"].to_numpy(dtype=float)
        total = total + weight * kept.sums["ce"].to_numpy(dtype=float)
    value = float(total.sum() / tokens.sum())
    documents = len(tokens)
    if documents < 2:
        return value, (None, None)
    residual = total - value * tokens
    error = math.sqrt(documents / (documents - 1) * float(np.square(residual).sum())) / float(tokens.sum())
    return value, wald(value, error, documents - 1, 0.95)
