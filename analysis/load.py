"""Sources of runs: a sweep directory, a CSV or Parquet table, a pandas frame, or W&B."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from analysis.frames import Frame, pd
from analysis.table import ROLES, SWEEP_ROLES, RunTable
from harness.errors import UserError

UNITS = {
    "tokens": "tokens",
    "unique_tokens": "tokens",
    "flops": "FLOP",
    "flops_executed": "FLOP",
    "wall_s": "s",
    "tokens_per_s": "tokens/s",
    "peak_memory_bytes": "bytes",
}

CELL_KEYS = (
    "sae.n_latents",
    "sae.k",
    "sae.n_experts",
    "sae.architecture",
    "train.seed",
    "train.lr",
    "train.lr_factor",
    "train.tokens",
    "train.flops",
)
"""Configuration keys in which the cells of one sweep are meant to differ."""

_ACTIVATION_COLUMNS = {"model": "activations.model", "hook": "activations.hook", "layer": "activations.layer"}


def load(
    source: str | os.PathLike[str] | Frame | Sequence[str],
    roles: Mapping[str, str] | None = None,
) -> RunTable:
    """Read runs from a source and give them roles.

    Args:
        source: A sweep directory, a run directory, a `.csv`, `.tsv` or `.parquet` file, `wandb:entity/project/group`,
            a pandas frame, or a list of these (stacked).
        roles: Role → column; overrides the defaults, which are those of a sweep directory. For other sources only
            the named roles and those defaults whose column exists are used.

    Raises `UserError` when the source cannot be read.
    """
    if isinstance(source, pd.DataFrame):
        return _with_roles(source, roles, "table")
    if not isinstance(source, str | os.PathLike):
        tables = [load(part, roles) for part in source]
        return tables[0] if len(tables) == 1 else _stack(tables)
    text = str(source)
    if text.startswith("wandb:"):
        from analysis.load_wandb import read_group

        frame, configs, histories = read_group(text.removeprefix("wandb:"))
        frame = frame.drop(columns="lr", errors="ignore")  # a summary holds the last one logged: decayed
        _spread(frame, configs)
        _learning_rate(frame)
        table = _with_roles(frame, roles, text, UNITS)
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
    """Every run of a sweep directory, the unfinished ones included (they are listed as left out)."""
    candidates = [directory] if (directory / "result.json").exists() else sorted(directory.iterdir())
    runs = [path for path in candidates if path.is_dir() and _is_run(path)]
    if not runs:
        raise UserError(f"{directory} holds no run (no folder with config.yaml or result.json in it)")
    rows = [_row(path) for path in runs]
    frame = pd.DataFrame(rows)
    _spread(frame, [row.pop("config", None) for row in rows])
    frame = frame.drop(columns="config", errors="ignore")
    _learning_rate(frame)
    for column in SWEEP_ROLES.values():
        if column not in frame:
            frame[column] = np.nan if column != "status" else None
    table = RunTable(frame, {**SWEEP_ROLES, **(roles or {})}, dict(UNITS), name=str(directory.name))
    table.directories = {str(run): path for run, path in zip(frame["run_id"], runs, strict=True)}
    table.histories = {run: partial(curve, path) for run, path in table.directories.items()}
    return table


def curve(directory: Path) -> Frame:
    """All lines of a run's `metrics.jsonl` (one row a line); a torn last line is ignored. Empty when there is none."""
    path = directory / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return pd.DataFrame(lines)


def evaluations(table: RunTable) -> Frame:
    """Held-out points of all usable runs: run, step, tokens, flops, loss, and whether the lr was constant so far.

    For a run without `metrics.jsonl` only its final point is known.
    """
    loss = table.roles["loss"]
    parts: list[Frame] = []
    for _, row in table.frame.iterrows():
        run = str(row[table.roles["run"]])
        final = {key: row.get(key) for key in ("tokens", "flops")} | {"loss": row[loss]}
        lines = table.history(run)
        if loss in lines and {"tokens", "flops"} <= set(lines):
            part = lines[lines[loss].notna()][["tokens", "flops", loss]].rename(columns={loss: "loss"})
            part = part[part["tokens"] < row.get("tokens", np.inf)]
            part = pd.concat([part, pd.DataFrame([final])], ignore_index=True)
        else:
            part = pd.DataFrame([final])
        decayed = float(row.get("train.decay_fraction") or 0.0) > 0
        parts.append(part.assign(run=run, constant_lr=not decayed))
    if not parts:
        empty = pd.DataFrame(columns=["tokens", "flops", "loss", "run", "constant_lr"])
        return empty.astype({"tokens": float, "flops": float, "loss": float, "constant_lr": bool})
    return pd.concat(parts, ignore_index=True).astype({"tokens": float, "flops": float, "loss": float})


def last_doubling(table: RunTable) -> dict[str, float]:
    """run → relative gain in loss over the last doubling of tokens; runs without a long enough curve are absent."""
    gains = {}
    for run, part in evaluations(table).groupby("run"):
        part = part.sort_values("tokens")
        tokens, log_loss = np.log(part["tokens"].to_numpy()), np.log(part["loss"].to_numpy())
        if len(tokens) > 1 and tokens[0] <= tokens[-1] - np.log(2):
            gains[str(run)] = float(np.interp(tokens[-1] - np.log(2), tokens, log_loss) - log_loss[-1])
    return gains


def _is_run(path: Path) -> bool:
    return (path / "result.json").exists() or (path / "config.yaml").exists()


def _row(path: Path) -> dict[str, Any]:
    """`result.json` of a run; for one that has none, or a damaged one, a row that says so."""
    result = path / "result.json"
    blank = {"run_id": path.name}
    if not result.exists():
        return blank | {"status": "unfinished", "error": "no result.json (still running, or interrupted)"}
    try:
        content = json.loads(result.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        return blank | {"status": "unreadable", "error": f"result.json: {problem}"}
    if not isinstance(content, dict):
        return blank | {"status": "unreadable", "error": "result.json is not an object"}
    return blank | content


def _spread(frame: Frame, configs: list[Any]) -> None:
    """Add the configuration keys that differ between runs, and those that name the population, as columns."""
    flat = pd.DataFrame([_flatten(config) if isinstance(config, dict) else {} for config in configs])
    for column in flat:
        if column.startswith(("sae.", "train.", "activations.", "stream.")):
            frame[column] = flat[column]
    for short, long in _ACTIVATION_COLUMNS.items():
        if long in flat and short not in frame:
            frame[short] = flat[long]
    if "sae.normalize" in flat:
        frame["normalize"] = flat["sae.normalize"]


def _learning_rate(frame: Frame) -> None:
    """The rate a run was trained with: `train.lr`, or the rule c·2e-4/√(n/2¹⁴) with c = `train.lr_factor`."""
    if "lr" in frame or "train.lr_factor" not in frame:
        return
    n = pd.to_numeric(frame.get("n_latents"), errors="coerce")
    rule = pd.to_numeric(frame["train.lr_factor"], errors="coerce") * 2e-4 / np.sqrt(n / 2**14)
    given = pd.to_numeric(frame["train.lr"], errors="coerce") if "train.lr" in frame else 0.0 * rule
    frame["lr"] = given.where(given > 0, rule)


def varied(table: RunTable) -> list[str]:
    """Configuration keys, beyond those a grid is made of, in which usable runs of one architecture differ."""
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


def _read_file(path: Path) -> Frame:
    """A CSV, TSV or Parquet file as a frame; `UserError` when it is none of them or holds no table."""
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


def _with_roles(
    frame: Frame, roles: Mapping[str, str] | None, name: str, units: Mapping[str, str] | None = None
) -> RunTable:
    """Named roles, then the default ones whose column happens to exist, or a column that is called like the role."""
    called = {role: role for role in ROLES if role in frame.columns}
    chosen = called | {role: column for role, column in SWEEP_ROLES.items() if column in frame.columns}
    taken = set((roles or {}).values())
    chosen = {role: column for role, column in chosen.items() if column not in taken}
    chosen |= roles or {}
    return RunTable(frame, chosen, dict(units or {}), name=name)


def _stack(tables: list[RunTable]) -> RunTable:
    """Several tables as one; their roles must agree."""
    first = tables[0]
    for other in tables[1:]:
        if other.roles != first.roles:
            raise UserError(f"{first.name} and {other.name} name different columns; give --n, --k, --loss … explicitly")
    frame = pd.concat([table.frame for table in tables], ignore_index=True)
    out = RunTable(frame, dict(first.roles), dict(first.units), name=" + ".join(t.name for t in tables))
    out.excluded = pd.concat([t.excluded for t in (*tables, out) if len(t.excluded)] or [out.excluded])
    out.notes = [entry for table in (*tables, out) for entry in table.notes]
    for table in tables:
        out.directories |= table.directories
        out.histories |= table.histories
    return out
