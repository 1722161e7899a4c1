"""Sources of runs: a sweep directory, a CSV or Parquet table, a pandas frame, or W&B."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.runs.axes import add_axes
from analysis.runs.table import ROLES, SWEEP_ROLES, RunTable
from harness.errors import UserError
from harness.record import metrics, names

CELL_KEYS = (
    "sae.n_latents",
    "sae.k",
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

_ACTIVATION_COLUMNS = {"model": "activations.model", "hook": "activations.hook", "layer": "activations.layer"}


def load(
    source: str | os.PathLike[str] | pd.DataFrame | Sequence[str],
    roles: Mapping[str, str] | None = None,
) -> RunTable:
    """Read runs from a source and give them roles.

    Args:
        source: A sweep directory, a run directory, a `.csv`, `.tsv` or `.parquet` file, `wandb:entity/project/group`,
            a pandas frame, or a list of these (stacked).
        roles: Role → column; overrides the defaults, which are those of a sweep directory. For other sources only
            the named roles and those defaults are used whose column exists.

    Raises `UserError` if the source cannot be read.
    """
    if isinstance(source, pd.DataFrame):
        return _with_roles(source, roles, "table")
    if not isinstance(source, str | os.PathLike):
        tables = [load(part, roles) for part in source]
        return tables[0] if len(tables) == 1 else _stack(tables)
    text = str(source)
    if text.startswith("wandb:"):
        from analysis.runs.load_wandb import read_group

        frame, configs, histories = read_group(text.removeprefix("wandb:"))
        frame = frame.drop(columns="lr", errors="ignore")  # the last rate that was logged; it may have decayed
        _spread(frame, configs)
        _learning_rate(frame)
        add_axes(frame, configs)
        table = _with_roles(frame, roles, text)
        table.histories = histories
        return table
    path = Path(text)
    if not path.exists():
        raise UserError(
            f"{path} does not exist; name a sweep directory, a CSV or Parquet file, or wandb:entity/project/group"
        )
    if path.is_dir():
        return read_sweep(path, roles)
    return _with_roles(_read_file(path), roles, path.name)


def read_sweep(directory: Path, roles: Mapping[str, str] | None = None) -> RunTable:
    """Every run of a sweep directory. Unfinished runs are listed as left out."""
    candidates = [directory] if (directory / names.RESULT).exists() else sorted(directory.iterdir())
    runs = [path for path in candidates if path.is_dir() and _is_run(path)]
    if not runs:
        raise UserError(f"{directory} holds no run (no folder with {names.CONFIG} or {names.RESULT} in it)")
    rows = [_row(path) for path in runs]
    frame = pd.DataFrame(rows)
    configs = [row.pop("config", None) for row in rows]
    _spread(frame, configs)
    frame = frame.drop(columns="config", errors="ignore")
    _learning_rate(frame)
    add_axes(frame, configs)
    for column in SWEEP_ROLES.values():
        if column not in frame:
            frame[column] = np.nan if column != "status" else None
    table = RunTable(frame, {**SWEEP_ROLES, **(roles or {})}, name=str(directory.name))
    table.directories = {str(run): path for run, path in zip(frame["run_id"], runs, strict=True)}
    table.histories = {run: partial(logged_lines, path) for run, path in table.directories.items()}
    return table


def logged_lines(directory: Path) -> pd.DataFrame:
    """All lines of a run's `metrics.jsonl`, one row per line; damaged lines are skipped. Empty without the file."""
    return pd.DataFrame(metrics.read(directory / names.METRICS, skip_damaged=True))


def _is_run(path: Path) -> bool:
    return (path / names.RESULT).exists() or (path / names.CONFIG).exists()


def _row(path: Path) -> dict[str, Any]:
    """`result.json` of a run; if it is missing or damaged, a row that says so."""
    result = path / names.RESULT
    blank = {"run_id": path.name}
    if not result.exists():
        return blank | {"status": "unfinished", "error": f"no {names.RESULT} (still running, or interrupted)"}
    try:
        content = json.loads(result.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        return blank | {"status": "unreadable", "error": f"{names.RESULT}: {problem}"}
    if not isinstance(content, dict):
        return blank | {"status": "unreadable", "error": f"{names.RESULT} is not an object"}
    return blank | content


def _spread(frame: pd.DataFrame, configs: list[Any]) -> None:
    """Add the settings of the configurations as columns, and short names for those that tell populations apart."""
    flat = pd.DataFrame([_flatten(config) if isinstance(config, dict) else {} for config in configs])
    for column in map(str, flat):
        if column.startswith(("sae.", "train.", "activations.", "stream.")):
            frame[column] = flat[column]
    for short, long in _ACTIVATION_COLUMNS.items():
        if long in flat and short not in frame:
            frame[short] = flat[long]
    if "sae.normalize" in flat:
        frame["normalize"] = flat["sae.normalize"]


def _learning_rate(frame: pd.DataFrame) -> None:
    """Add the column `lr`, the peak rate of each run: `train.lr` if it is set, else the rule with `train.lr_factor`."""
    if "lr" in frame or "train.lr_factor" not in frame:
        return
    from harness.budget import learning_rate_rule  # takes a tenth of a second: omegaconf

    n, factor, given = (_numbers(frame, column) for column in ("n_latents", "train.lr_factor", "train.lr"))
    rule = [learning_rate_rule(size, c) if size > 0 else np.nan for size, c in zip(n, factor, strict=True)]
    frame["lr"] = given.where(given > 0, np.array(rule))


def _numbers(frame: pd.DataFrame, column: str) -> pd.Series:
    """A column as float64; NaN where it holds no number or does not exist."""
    if column not in frame:
        return pd.Series(np.nan, index=frame.index)
    return pd.to_numeric(frame[column], errors="coerce").astype(float)


def varied(table: RunTable) -> list[str]:
    """Configuration keys other than `CELL_KEYS` in which usable runs of one architecture differ."""
    frame = table.frame
    keys = [column for column in frame.columns if "." in column and column not in CELL_KEYS]
    kind = frame["sae"] if "sae" in frame else pd.Series("", index=frame.index)
    return [key for key in keys if frame[key].astype(str).groupby(kind).nunique().gt(1).any()]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _read_file(path: Path) -> pd.DataFrame:
    """A CSV, TSV or Parquet file as a frame. Raises `UserError` if the file is none of these or holds no table."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".txt", ".parquet"):
        raise UserError(f"{path}: unknown kind of table {suffix!r}; use .csv, .tsv or .parquet")
    try:
        if suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if suffix == ".tsv" else ",", comment="#", skipinitialspace=True)
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty") from None
    except pd.errors.ParserError as problem:
        raise UserError(f"{path} cannot be read as a table: {str(problem).strip()}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; save it as CSV in UTF-8, or as Parquet") from None
    except (OSError, ValueError) as problem:
        raise UserError(f"{path} cannot be read: {str(problem).splitlines()[0]}") from None
    frame.columns = [str(column).strip() for column in frame.columns]
    if frame.shape[1] == 1 and any(mark in str(frame.columns[0]) for mark in ";\t|"):
        raise UserError(f"{path}: one column {frame.columns[0]!r}; columns must be separated by commas (or use .tsv)")
    if frame.empty:
        raise UserError(f"{path} has a header but no rows")
    return frame


def _with_roles(frame: pd.DataFrame, roles: Mapping[str, str] | None, name: str) -> RunTable:
    """A table with the given roles, and with each other role whose default column, or one of its name, exists."""
    named_alike = {role: role for role in ROLES if role in frame.columns}
    chosen = named_alike | {role: column for role, column in SWEEP_ROLES.items() if column in frame.columns}
    taken = set((roles or {}).values())
    chosen = {role: column for role, column in chosen.items() if column not in taken}
    chosen |= roles or {}
    return RunTable(frame, chosen, name=name)


def _stack(tables: list[RunTable]) -> RunTable:
    """Several tables as one; their roles must agree."""
    first = tables[0]
    for other in tables[1:]:
        if other.roles != first.roles:
            raise UserError(f"{first.name} and {other.name} name different columns; give --n, --k, --loss … explicitly")
    frame = pd.concat([table.frame for table in tables], ignore_index=True)
    out = RunTable(frame, dict(first.roles), name=" + ".join(t.name for t in tables))
    out.excluded = pd.concat([t.excluded for t in (*tables, out) if len(t.excluded)] or [out.excluded])
    out.notes = [entry for table in (*tables, out) for entry in table.notes]
    for table in tables:
        out.directories |= table.directories
        out.histories |= table.histories
    return out
