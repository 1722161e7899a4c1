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
    for run in table.frame[table.roles["run"]].astype(str):
        part = curve(table.history(run), table.roles["loss"])
        tokens, log_loss = np.log(part["tokens"].to_numpy()), np.log(part["loss"].to_numpy())
        if len(tokens) > 1 and tokens[0] <= tokens[-1] - np.log(2):
            gains[run] = float(np.interp(tokens[-1] - np.log(2), tokens, log_loss) - log_loss[-1])
    return gains


def curve(lines: pd.DataFrame, loss: str) -> pd.DataFrame:
    """The held-out curve in the logged lines of one run: tokens and loss, by rising tokens.

    Its points are on the same held-out rows: the final evaluation, which uses all of them, belongs to it only if the
    others do too. Empty without such lines.
    """
    if not {loss, "tokens"} <= set(lines):
        return pd.DataFrame({"tokens": [], "loss": []}, dtype=float)
    lines = lines[lines[loss].notna()]
    if "eval_rows" in lines and len(lines):
        lines = lines[lines["eval_rows"] == lines["eval_rows"].mode().iloc[0]]
    points = lines[["tokens", loss]].apply(pd.to_numeric, errors="coerce").rename(columns={loss: "loss"})
    points = points[(points["tokens"] > 0) & (points["loss"] > 0)]
    return points.drop_duplicates("tokens").sort_values("tokens").astype(float)


SPAN = 16.0
"""A curve counts from its last tokens back to this part of them: earlier, the loss is no power of tokens."""


def curve_points(table: RunTable) -> RunTable:
    """The points of the curves of runs with a constant learning rate, half a doubling of tokens apart, as rows of their
    own with the name of their run. Other runs are left out: where the rate decays, early points are too high.

    A table without curves is returned unchanged.
    """
    if not table.histories or not table.has("d"):
        return table
    names, loss, tokens = table.column("run").astype(str), table.roles["loss"], table.roles["d"]
    parts, usable = [], []
    for run, (_, row) in zip(names, table.frame.iterrows(), strict=True):
        points = curve(table.history(run), loss)
        points = points[points["tokens"] > setting(row, "train.warmup_tokens")]
        usable.append(len(points) > 1 and not decays(row))
        if usable[-1]:
            last = points["tokens"].iloc[-1]
            step = np.round(2 * np.log2(last / points["tokens"])).astype(int)
            points = points[(points["tokens"] >= last / SPAN * 0.99)].assign(step=step).drop_duplicates("step")
            repeated = pd.DataFrame([row] * len(points))
            parts.append(repeated.assign(**{tokens: points["tokens"].to_numpy(), loss: points["loss"].to_numpy()}))
    out = table.keep(np.array(usable, dtype=bool), "no curve at a constant learning rate")
    return out.but(frame=pd.concat(parts, ignore_index=True)) if parts else out


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
