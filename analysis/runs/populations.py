"""Runs that may be fitted together: of one setting (model, hook, layer …), one architecture, and each cell at its best
learning rate. What is left out is listed with its reason, and a note says what differs.

Only runs of a sweep directory or of W&B are told apart. In other tables a column that is called `hook` may mean
anything: there a note says that the runs differ.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.laws.law import Law
from analysis.notes import note
from analysis.runs.quality import PREFIX
from analysis.runs.table import RunTable

SETTING = ("model", "hook", "layer", "normalize", "d_model", "store_id")
"""Columns that are equal in runs of one setting."""

POPULATION = ("sae", "n_experts", *SETTING)
"""Columns in which the runs of one fit must agree."""

CELL_KEYS = (
    "sae.n_latents",
    "sae.k",
    "sae.target_l0",
    "sae.sparsity",
    "sae.n_experts",
    "sae.architecture",
    "train.seed",
    "stream.seed",
    "train.lr",
    "train.lr_factor",
    "train.tokens",
    "train.flops",
)
"""Configuration keys in which the cells of a sweep are meant to differ."""

WORSE_RATE = "not the best learning rate of its n and k"
"""Why a run at a worse learning rate than another of its cell is left out."""

_CELL = ("sae", "n_latents", "k", "n_experts", "seed", "lr", "train.tokens", "train.flops", "train.until")


def varied(table: RunTable) -> list[str]:
    """Configuration keys other than `CELL_KEYS` in which usable runs of one architecture differ."""
    frame = table.frame
    names = [column for column in frame.columns if "." in column and not column.startswith(PREFIX)]
    keys = [name for name in names if name not in CELL_KEYS]
    kind = frame["sae"] if "sae" in frame else pd.Series("", index=frame.index)
    return [key for key in keys if frame[key].astype(str).groupby(kind.astype(str)).nunique().gt(1).any()]


def settings(table: RunTable) -> dict[str, RunTable]:
    """The runs of each setting by what sets it apart ("hook=mlp_out"), the largest first; one entry, "", if there is
    only one. A key of the configuration sets runs apart if one cell was run with several of its values."""
    frame = table.frame
    if not table.histories or len(frame) < 2:
        return {"": table}
    cell = frame[[name for name in _CELL if name in frame]].astype(object).map(str).agg(" ".join, axis=1)
    crossed = [key for key in varied(table) if frame[key].astype(str).groupby(cell).nunique().max() > 1]
    kept = _telling(frame, [*SETTING[:-1], *crossed, SETTING[-1]])
    if not kept:
        return {"": table}
    labels = frame[kept].apply(lambda row: ", ".join(f"{key}={row[key]}" for key in kept), axis=1)
    names = sorted(labels.unique(), key=lambda label: (-int((labels == label).sum()), label))
    parts = {}
    for name in names:
        parts[name] = table.keep((labels == name).to_numpy(), f"another setting than {name}")
        text = f"the runs differ in {', '.join(kept)}; each setting is fitted on its own, here {name}"
        other = names[names[0] == name]
        remedy = f"choose another with {' '.join(f'--where {part}' for part in other.split(', '))}"
        parts[name].notes.append(note("mixed_population", "warning", text, remedy))
    return parts


def one_setting(table: RunTable) -> RunTable:
    """The runs of the setting with most runs; the others are listed as left out."""
    return next(iter(settings(table).values()))


def differing(table: RunTable) -> list[str]:
    """What tells the usable runs apart besides their architecture, sizes, seed and budget: columns of the table."""
    return _telling(table.frame, [*SETTING[:-1], *varied(table), "train.lr", "train.lr_factor", SETTING[-1]])


def _telling(frame: pd.DataFrame, keys: list[str]) -> list[str]:
    """The keys that tell more runs apart than those before them do."""
    kept: list[str] = []
    groups = 1
    for key in (key for key in keys if key in frame):
        more = len(frame[[*kept, key]].astype(object).map(str).drop_duplicates())
        if more > groups:
            kept.append(key)
            groups = more
    return kept


def one_architecture(table: RunTable, law: Law) -> RunTable:
    """The runs of one architecture: of TopK if the table has any, else of the one with most runs.

    A law in the number of experts takes all of them, and so does a column `sae` with words that are not ours.
    """
    if "sae" not in table.frame or "experts" in law.inputs:
        return table
    from harness.config import ARCHITECTURES  # takes a tenth of a second: omegaconf

    counts = table.frame["sae"].astype(object).map(str).value_counts()
    if len(counts) > 1 and (table.histories or set(counts.index) <= set(ARCHITECTURES)):
        chosen = "topk" if "topk" in counts.index else str(counts.index[0])
        table = table.where(f"another architecture than {chosen}; choose it with --where sae=…", sae=chosen)
    return table


def at_best_rate(table: RunTable) -> RunTable:
    """The runs at the best learning rate of their cell (n, k, architecture, budget); the others are left out.

    A table in which every cell has one learning rate is returned unchanged. A note says that rates were chosen, and
    another if the cells did not choose from the same rates, so that sizes differ partly by their rates.
    """
    if not {"n", "k", "lr", "loss"} <= set(table.roles) - table.guessed or not len(table):
        return table
    frame, lr = table.frame, table.values("lr")
    cell = pd.Series([f"{n:g} {k:g}" for n, k in zip(table.values("n"), table.values("k"), strict=True)])
    for name in ("sae", "n_experts", "train.tokens", "train.flops"):
        cell = cell + " " + frame[name].astype(object).map(str) if name in frame else cell
    table = _with_rates_note(table, cell)
    rates = pd.Series(lr).groupby(cell).nunique()
    if rates.max() <= 1:
        return table
    mean = pd.Series(table.values("loss")).groupby([cell, pd.Series(lr)]).transform("mean")
    best = mean <= mean.groupby(cell).transform("min") * (1 + 1e-12)
    out = table.keep(best.to_numpy(), WORSE_RATE)
    text = f"{int((~best).sum())} runs have a worse learning rate than another of the same n and k and were left out"
    out.notes.append(note("mixed_population", "info", text))
    return out


def _with_rates_note(table: RunTable, cell: pd.Series) -> RunTable:
    """The table with a note if its cells were run at different settings of the learning rate."""
    frame = table.frame
    if "train.lr_factor" not in frame:
        return table
    fixed = pd.to_numeric(frame.get("train.lr", pd.Series(np.nan, frame.index)), errors="coerce")
    factor = "train.lr_factor=" + frame["train.lr_factor"].astype(object).map(str)
    rule = ("train.lr=" + fixed.astype(object).map(str)).where(fixed > 0, factor)
    tried = rule.groupby(cell).agg(lambda rules: ", ".join(sorted(set(rules))))
    if tried.nunique() <= 1:
        return table
    out = table.but()
    shown = "; ".join(sorted(tried.unique())[:3])
    text = f"the cells were not run at the same learning rates ({shown}), so sizes differ partly by their rates"
    out.notes.append(note("mixed_population", "warning", text, "run every cell at the same rates"))
    return out
