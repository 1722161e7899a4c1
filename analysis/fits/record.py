"""What the record of the runs says and no residual can show: they stopped at a budget, their learning rate was never
tuned with size, they saw one order of the data."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.laws.law import Law
from analysis.notes import Note, note
from analysis.runs.curves import decays, last_doubling
from analysis.runs.populations import WORSE_RATE
from analysis.runs.table import RunTable

STILL_FALLING = 0.01
"""Relative gain over the last doubling of tokens above which a curve still falls."""

CURVES_READ = 40
"""Most runs whose curves are read to see whether they still fall."""

CONSTANT_RATE = (
    "train with a constant rate (train.decay_fraction=0), then fit sae_nkd, which has a term for tokens; or "
    "train.until=convergence"
)
"""What to do about a level at a budget if the rates decay, so that no curve says what more tokens bring."""

RATES = 2
"""A size was tuned if at least this many learning rates were tried at it; a study tunes at least as many sizes."""


def record_notes(table: RunTable, law: Law) -> list[Note]:
    """Notes on what the record says about a law in n; none for laws of other quantities."""
    if not (law.scale_input == "n" or table.roles.get("x") == table.roles.get("n")):
        return []
    return [*_budget(table, law), *_one_rate(table), *_one_order(table)]


def _budget(table: RunTable, law: Law) -> list[Note]:
    """A note if the floor of the law may be what is left after a fixed number of tokens."""
    if law.floor is None or "d" in law.inputs or not len(table):
        return []
    flags = table.column("converged") if table.has("converged") else pd.Series(dtype=object)
    if len(flags) and flags.eq(True).all():
        return []
    meaning = "a fitted floor is the level at this budget of tokens, not that of converged runs"
    gains = np.array(list(last_doubling(_thinned(table)).values())) if table.histories else np.array([])
    if len(gains):
        if gains.max() <= STILL_FALLING:
            return []
        middle, most = 100 * np.median(gains), 100 * gains.max()
        text = f"the curves still fall, by {middle:.2g} % over the last doubling of tokens (at most {most:.2g} %)"
        remedy = CONSTANT_RATE if all(decays(row) for _, row in table.frame.iterrows()) else ""
        return [note("level_at_budget", "warning", f"{text}: {meaning}", remedy)]
    if flags.notna().any():
        return [note("level_at_budget", "warning", f"runs are not converged: {meaning}")]
    if table.has("d"):
        return [note("level_at_budget", "warning", f"runs are at fixed tokens and have no curves: {meaning}")]
    text = f"nothing here says whether the runs converged; if they did not, {meaning}"
    return [note("level_at_budget", "info", text)]


def _thinned(table: RunTable) -> RunTable:
    """At most `CURVES_READ` of the runs, evenly over n."""
    if len(table) <= CURVES_READ:
        return table
    order = np.argsort(table.values("n"), kind="stable")
    rows = order[np.linspace(0, len(order) - 1, CURVES_READ).astype(int)]
    return table.but(frame=table.frame.iloc[rows].reset_index(drop=True))


def _one_rate(table: RunTable) -> list[Note]:
    """A note if the learning rate of every size came from a rule that was not tried at several sizes."""
    if not {"lr", "n"} <= set(table.roles):
        return []
    n, lr = table.roles["n"], table.roles["lr"]
    worse = table.excluded[table.excluded["reason"] == WORSE_RATE]
    tried = pd.concat([part for part in (table.frame, worse) if len(part)] or [table.frame])
    rates = pd.to_numeric(tried[lr], errors="coerce")
    if rates.isna().all():
        return []
    tuned = int((rates.groupby(pd.to_numeric(tried[n], errors="coerce")).nunique() >= RATES).sum())
    if tuned >= RATES:
        return []
    text = "the learning rate follows one rule over all n, which was not tried against others at several sizes"
    text += ": exponents and comparisons of architectures hold for this rule"
    return [note("untuned_rates", "warning", text)]


def _one_order(table: RunTable) -> list[Note]:
    """A note if all runs saw the same rows in the same order."""
    known = [name for name in ("stream.seed", "store_id") if name in table.frame]
    if "stream.seed" not in known or not len(table):
        return []
    if any(table.frame[name].astype(object).map(str).nunique() > 1 for name in known):
        return []
    text = "all runs saw one order of one store's rows (stream.seed and the store never vary)"
    return [note("one_data_order", "warning", f"{text}: intervals are conditional on this order of the data")]
