"""Sums per held-out document that runs keep: of error and variance (`heldout.parquet`), of the losses of the language
model (`quality/downstream.per_document.parquet`)."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.laws.law import Array
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.record import names
from harness.record.quality import read_quality

COLUMNS = {"fvu": ("error", "variance"), "fvu_raw": ("error_raw", "variance_raw")}
"""Loss → the columns of which it is the ratio of the sums."""
QUALITIES = {
    "quality.downstream.kl": ("kl", "positions"),
    "quality.downstream.fvu": ("error", "variance"),
}
"""The same, for what is kept with the metric `downstream`."""


def influences(table: RunTable) -> tuple[list[str], Array]:
    """What each held-out document adds to ln(loss) of each run, to first order.

    Returns (runs, influence): influence (runs, documents) is e_d/Σe − v_d/Σv, which sums to 0 over the documents. Only
    runs that were evaluated on the same documents of the same store can be paired: if there are several such groups,
    the largest. No runs if none keeps its sums. Raises `UserError` for a damaged file.
    """
    loss = table.roles.get("loss", "")
    columns = COLUMNS.get(loss) or QUALITIES.get(loss)
    if columns is None or not table.directories:
        return [], np.zeros((0, 0))
    groups: dict[tuple[Any, ...], dict[str, Array]] = {}
    for _, row in table.frame.iterrows():
        run = str(row[table.roles["run"]])
        directory = table.directories.get(run)
        if directory is None:
            continue
        kept = downstream_sums(directory) if loss in QUALITIES else _heldout_sums(directory, row)
        if kept is None or not set(columns) <= set(kept.sums):
            continue
        error, variance = (kept.sums[name].to_numpy(dtype=float) for name in columns)
        groups.setdefault(kept.same, {})[run] = error / error.sum() - variance / variance.sum()
    if not groups:
        return [], np.zeros((0, 0))
    largest = max(groups.values(), key=len)
    return list(largest), np.array(list(largest.values()))


class Kept(NamedTuple):
    """What a run keeps per document."""

    sums: pd.DataFrame
    same: tuple[Any, ...]
    """Equal for runs that were evaluated on the same documents."""


def _heldout_sums(directory: Path, row: Any) -> Kept | None:
    sums = _read(directory / names.HELDOUT, row.get("heldout_sha256"))
    if sums is None or not {"document", "rows"} <= set(sums):
        return None
    return Kept(sums, (row.get("store_id"), *(sums[name].to_numpy().tobytes() for name in ("document", "rows"))))


def downstream_sums(directory: Path) -> Kept | None:
    """Losses of the language model per document, next to those of the unchanged model; None where none are kept.

    Raises `UserError` for a damaged file.
    """
    found = read_quality(directory, "downstream")
    if found is None or found["per_document"] is None:
        return None
    path = directory / names.QUALITY / found["per_document"]
    try:
        sums = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove {path.parent} and evaluate the run again") from None
    if not {"positions", "tokens", "ce"} <= set(sums):
        return None
    # the documents are a function of the store and the number of tokens
    settings = tuple(found["settings"].get(name) for name in ("store", "tokens"))
    return Kept(sums, (*settings, *(sums[name].to_numpy().tobytes() for name in ("positions", "tokens"))))


def _read(path: Path, sha256: Any) -> pd.DataFrame | None:
    """The sums of one run; None if it keeps none (a run of an earlier version, or of W&B)."""
    if not isinstance(sha256, str) or not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is damaged (its sha256 is not that of {names.RESULT}); remove it to do without it")
    return pd.read_parquet(io.BytesIO(content))
