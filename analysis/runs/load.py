"""Sources of runs: a sweep directory, a table in a file or in memory, or W&B."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.notes import note
from analysis.runs.axes import add_axes
from analysis.runs.quality import quality_columns, require_positive
from analysis.runs.read_table import as_frame, read_file
from analysis.runs.table import ROLES, SWEEP_ROLES, RunTable
from analysis.runs.vocabulary import ended_well, is_ours
from harness.errors import UserError
from harness.files import user_path
from harness.record import metrics, names

_ACTIVATION_COLUMNS = {"model": "activations.model", "hook": "activations.hook", "layer": "activations.layer"}


def load(
    source: Any,
    roles: Mapping[str, str] | None = None,
) -> RunTable:
    """Read runs from a source and give them roles.

    Args:
        source: A sweep directory, a run directory, a file that `read_table.read_file` reads (CSV, TSV, Parquet, JSON,
            compressed or not), `wandb:entity/project/group`, a table that `read_table.as_frame` reads (of pandas,
            polars, pyarrow, numpy; a dict of columns), or a list of these (stacked).
        roles: Role → column; overrides the defaults, which are those of a sweep directory. For other sources only
            the named roles and those defaults are used whose column exists. What is used by its mere name excludes
            no run before a law needs it.

    Raises `UserError` if the source cannot be read.
    """
    if isinstance(source, RunTable) and not roles:
        return source
    frame = as_frame(source)
    if frame is not None:
        return _with_roles(frame, roles, "table")
    if not isinstance(source, str | os.PathLike):
        return _stack([load(part, roles) for part in _parts(source)])
    text = str(source)
    if text.startswith("wandb:"):
        from analysis.runs.load_wandb import read_group

        frame, configs, histories = read_group(text.removeprefix("wandb:"))
        frame = frame.drop(columns="lr", errors="ignore")  # the last rate that was logged; it may have decayed
        _spread(frame, configs)
        _learning_rate(frame)
        add_axes(frame, configs)
        table = _with_roles(frame, roles, text, given=("run", "status"))
        table.histories = histories
        return table
    path = Path(user_path(text))
    if not path.exists():
        raise UserError(
            f"{path} does not exist; name a sweep directory, a CSV or Parquet file, or wandb:entity/project/group"
        )
    if path.is_dir():
        return read_sweep(path, roles)
    frame, notes = read_file(path)
    table = _with_roles(frame, roles, path.name)
    table.notes = [*notes, *table.notes]
    return table


def _parts(source: Any) -> list[Any]:
    """The sources in a list, a tuple or another iterable. Raises `UserError` if it is none."""
    known = "a path, wandb:entity/project/group, a table of pandas, polars or pyarrow, a numpy array with named fields"
    wrong = f"a {type(source).__name__} is no table of runs; give {known}, a dict of columns, or a list of these"
    if isinstance(source, bytes | np.ndarray) or hasattr(source, "read") or not isinstance(source, Iterable):
        raise UserError(wrong)
    parts = list(source)
    if not parts or any(isinstance(part, int | float | bytes) or part is None for part in parts):
        raise UserError(wrong if parts else f"this {type(source).__name__} names no source of runs")
    return parts


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
    _active_latents(frame)
    _learning_rate(frame)
    frame["epochs"] = _numbers(frame, "tokens") / _numbers(frame, "unique_tokens")
    add_axes(frame, configs)
    frame = pd.concat([frame, quality_columns(runs)], axis=1)
    for column in SWEEP_ROLES.values():
        if column not in frame:
            frame[column] = np.nan if column != "status" else None
    table = RunTable(frame, {**SWEEP_ROLES, **_own_error(frame, roles or {})}, name=str(directory.name))
    table.directories = {str(run): path for run, path in zip(frame["run_id"], runs, strict=True)}
    table.histories = {run: partial(logged_lines, path) for run, path in table.directories.items()}
    return table


def _own_error(frame: pd.DataFrame, roles: Mapping[str, str]) -> dict[str, str]:
    """The roles with the standard error that belongs to the named loss. Raises `UserError` for a loss without a law."""
    loss = roles.get("loss", "")
    require_positive(loss)
    return {**({"loss_se": f"{loss}_se"} if f"{loss}_se" in frame else {}), **roles}


def _active_latents(frame: pd.DataFrame) -> None:
    """Fill in k where it is not a setting: the target of L0, or without one what was measured."""
    if "k" not in frame:
        return
    k = _numbers(frame, "k")
    for column in ("sae.target_l0", "l0"):
        k = k.where(k > 0, _numbers(frame, column))
    frame["k"] = k


def logged_lines(directory: Path) -> pd.DataFrame:
    """All lines of a run's `metrics.jsonl`, one row per line; damaged lines are skipped. Empty without the file."""
    try:
        lines = metrics.read(directory / names.METRICS, skip_damaged=True)
    except OSError:  # a directory of that name, or not ours to read: the run counts by its result alone
        lines = []
    return pd.DataFrame([line for line in lines if isinstance(line, dict)])


def _is_run(path: Path) -> bool:
    try:
        return (path / names.RESULT).exists() or (path / names.CONFIG).exists()
    except PermissionError:
        return True  # a row will say that it cannot be read


def _row(path: Path) -> dict[str, Any]:
    """`result.json` of a run; if it is missing, damaged or of another run, a row that says so."""
    from harness.record.result import read_result  # takes a tenth of a second: omegaconf

    blank: dict[str, Any] = {"run_id": path.name}
    try:
        content = read_result(path)
    except UserError as problem:
        return blank | {"status": "unreadable", "error": str(problem)}
    if content is None:
        return blank | {"status": "unfinished", "error": f"no {names.RESULT} (still running, or interrupted)"}
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


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return flat


def _with_roles(frame: pd.DataFrame, roles: Mapping[str, str] | None, name: str, given: Sequence[str] = ()) -> RunTable:
    """A table with the given roles, and with each other role whose default column, or one of its name, exists.

    A mere name excludes no run: what is `done` or `converged` in a table of somebody else is not ours to say, unless
    the words are ours. A note names the columns that were seen and not used.
    """
    named_alike = {role: role for role in ROLES if role in frame.columns}
    chosen = named_alike | {role: column for role, column in SWEEP_ROLES.items() if column in frame.columns}
    taken = set((roles or {}).values())
    guessed = {role: column for role, column in chosen.items() if column not in taken and role not in (roles or {})}
    notes = []
    words = frame[guessed["status"]] if "status" in guessed and frame.columns.is_unique else None
    if words is not None and "status" not in given and not is_ours(words):
        done, _ = ended_well(words)
        text = f"the column {guessed['status']!r} ({_few(words)}) was seen and not used"
        if not done.all():
            text += f"; --status {guessed['status']} leaves out {int((~done).sum())} of {len(done)} runs"
        notes.append(note("unused_column", "info" if done.all() else "warning", text))
        del guessed["status"]
    ours = {"n_latents", "k", "fvu", "run_id", "status"} <= {guessed.get(role) for role in guessed}
    if "converged" in guessed and not ours:
        column = guessed.pop("converged")
        if frame.columns.is_unique and frame[column].nunique() > 1:
            text = f"the column {column!r} ({_few(frame[column])}) was seen and not used; --converged {column} uses it"
            notes.append(note("unused_column", "warning", text))
    unchecked = frozenset() if ours else frozenset(set(guessed) - set(given))
    return RunTable(frame, guessed | dict(roles or {}), notes, name, guessed=unchecked)


def _few(column: pd.Series) -> str:
    values = sorted(column.astype(object).map(str).unique())
    return ", ".join(value[:30] for value in values[:4]) + (", …" if len(values) > 4 else "")


def _stack(tables: list[RunTable]) -> RunTable:
    """Several tables as one; their roles must agree. Rows without names are numbered anew."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for other in tables[1:]:
        if other.roles != first.roles:
            raise UserError(f"{first.name} and {other.name} name different columns; give --n, --k, --loss … explicitly")
    frame, roles = pd.concat([table.frame for table in tables], ignore_index=True), dict(first.roles)
    if any(table.nameless for table in tables):
        frame = frame.drop(columns=roles.pop("run"))
    guessed = frozenset[str]().union(*(table.guessed for table in tables))
    out = RunTable(frame, roles, name=" + ".join(t.name for t in tables), guessed=guessed)
    out.excluded = pd.concat([t.excluded for t in (*tables, out) if len(t.excluded)] or [out.excluded])
    out.notes = [entry for table in (*tables, out) for entry in table.notes]
    for table in tables:
        out.directories |= table.directories
        out.histories |= table.histories
    return out
