"""Curves of runs: held-out loss against tokens and FLOPs, from `metrics.jsonl`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from analysis.notes import Note, note
from analysis.runs.table import RunTable


def evaluations(table: RunTable) -> pd.DataFrame:
    """Held-out points of all usable runs: tokens, flops, loss, run, constant_lr (whether the run's rate is constant).

    A run without `metrics.jsonl` contributes only its final point.
    """
    table = table.use("loss")
    loss = table.roles["loss"]
    parts: list[pd.DataFrame] = []
    for _, row in table.frame.iterrows():
        run = str(row[table.roles["run"]])
        axis = table.roles.get("flops", "flops")
        flops = row.get(axis)
        final = {"tokens": row.get("tokens"), "flops": flops, "loss": row[loss]}
        lines = table.history(run)
        if loss in lines and {"tokens", "flops"} <= set(lines):
            if axis not in lines:  # a line has the FLOPs with a nominal AuxK; those of other counts grow alike
                lines = lines.assign(**{axis: lines["flops"] * _ratio(flops, row.get("flops"))})
            part = lines[["tokens", axis, loss]].apply(pd.to_numeric, errors="coerce").dropna()
            part = part.rename(columns={loss: "loss", axis: "flops"})
            part = part[part["tokens"] < row.get("tokens", np.inf)]
            part = pd.concat([part, pd.DataFrame([final])], ignore_index=True)
        else:
            part = pd.DataFrame([final])
        parts.append(part.assign(run=run, constant_lr=not decays(row)))
    if not parts:
        empty = pd.DataFrame(columns=["tokens", "flops", "loss", "run", "constant_lr"])
        return empty.astype({"tokens": float, "flops": float, "loss": float, "constant_lr": bool})
    return pd.concat(parts, ignore_index=True).astype({"tokens": float, "flops": float, "loss": float})


def _ratio(value: Any, other: Any) -> float:
    try:
        ratio = float(value) / float(other)
    except (TypeError, ValueError, ZeroDivisionError):
        return 1.0
    return ratio if np.isfinite(ratio) else 1.0


def decays(row: pd.Series) -> bool:
    """Whether the learning rate of a run (a row of a table) decays."""
    return setting(row, "train.decay_fraction") > 0 or row.get("train.schedule") in ("linear", "cosine")


def setting(row: pd.Series, key: str) -> float:
    """A number of a run's configuration (a row of a table); 0 if it is not recorded as one."""
    value: Any = row.get(key)
    known = isinstance(value, int | float | np.number) and np.isfinite(value)
    return float(value) if known else 0.0


def last_doubling(table: RunTable) -> dict[str, float]:
    """run → relative gain in loss over the last doubling of tokens; runs without a long enough curve are absent."""
    gains = {}
    for run, part in evaluations(table).groupby("run"):
        part = part.sort_values("tokens")
        part = part[(part["tokens"] > 0) & (part["loss"] > 0)]
        tokens, log_loss = np.log(part["tokens"].to_numpy()), np.log(part["loss"].to_numpy())
        if len(tokens) > 1 and tokens[0] <= tokens[-1] - np.log(2):
            gains[str(run)] = float(np.interp(tokens[-1] - np.log(2), tokens, log_loss) - log_loss[-1])
    return gains


def repeated_rows(table: RunTable) -> list[Note]:
    """A note if runs saw the rows of their source several times: more tokens then bring less than new ones would."""
    epochs = table.frame.get("epochs", pd.Series(dtype=float))
    if not (epochs > 1).any():
        return []
    text = f"each row was seen {_times(epochs)}: this law over tokens is not one of new tokens"
    return [note("repeated_rows", "warning", text)]


def _times(epochs: pd.Series) -> str:
    low, high = (f"{end:.3g}" for end in (epochs.min(), epochs.max()))
    return f"{high} times" if low == high else f"{low} to {high} times"


def seen(table: RunTable) -> str:
    """How often the runs saw each row of their source, as a sentence; "" if once."""
    epochs = table.frame.get("epochs", pd.Series(dtype=float))
    return f"Each row of the source was seen {_times(epochs)}." if (epochs > 1).any() else ""
