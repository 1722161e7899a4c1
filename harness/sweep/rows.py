"""The runs of a sweep as rows: how far each is, what went wrong, planned beside real. From the files alone."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.cell_names import cell_names
from harness.config import to_container
from harness.errors import UserError
from harness.files import last_line
from harness.places.slurm.explain import explain
from harness.record import metrics, names
from harness.record.job import pack_sizes, packs_root
from harness.record.notes import read_notes
from harness.record.rundir import attempts, read_config
from harness.record.state import RunState, state_of
from harness.record.sweepdir import read_plan, read_study, require_sweep

Row = dict[str, Any]

_SETTINGS = "settings"
"""Key of the configuration in a row that is not finished."""

FACTS = ("progress", "tokens", "fvu", "fvu_se", "dead_frac", "tokens_per_s", "wall_s", "error")


WORSE_THAN_THE_MEAN = "fvu {:.4g} is worse than the mean: predicting the mean row would have an fvu of 1"


def sweep_rows(sweep_dir: Path, final: dict[str, Row] | None = None) -> list[Row]:
    """One row per run that was asked for or exists in `sweep_dir`; Slurm is asked about runs that wait. Raises
    `UserError`.

    Keys: run_id, cell (what tells it from the others; None if its settings are unknown), status, progress (share of
    the budget), tokens, fvu, fvu_se, dead_frac, tokens_per_s, wall_s, attempts, restarts, host (while it runs), ends
    (expected, ISO 8601, while it runs), together (runs of its job), repeats (times that each row of the store is read),
    log (path), error (what went wrong, in a line), notes (a list), planned_s and took_s (steps and evaluations; in a
    pack its share), planned_memory_bytes, peak_memory_bytes. What is not known is None.

    `final` keeps the rows of runs that have ended from one call to the next: they are not read again.
    """
    begun = begun_runs(sweep_dir)
    planned, packed = read_plan(sweep_dir)["runs"], pack_sizes(sweep_dir)
    rows = []
    for name in begun:
        row = (final or {}).get(name)
        if row is None:
            row = _row_or_problem(sweep_dir / name, planned.get(name, {}), begun[name], packed.get(name, 1))
            if final is not None and row["status"] in ("done", "diverged"):
                final[name] = row
        rows.append(row)
    _ask_slurm(sweep_dir, rows)
    known = [row for row in rows if row[_SETTINGS]]
    names_of = dict(zip((row["run_id"] for row in known), cell_names([row[_SETTINGS] for row in known]), strict=True))
    return [{"run_id": row["run_id"], "cell": names_of.get(row["run_id"])} | _without_settings(row) for row in rows]


def _without_settings(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != _SETTINGS}


def _settings(run_dir: Path, state: RunState, planned: Mapping[str, Any], begun: bool) -> dict[str, Any]:
    """The configuration of a run, from the first file that has it; empty if none has."""
    if state.result is not None and isinstance(state.result.get("config"), dict):
        return state.result["config"]
    if "settings" in planned or not begun:
        return planned.get("settings", {})
    try:
        return to_container(read_config(run_dir))
    except UserError:
        return {}  # the state of the other runs is still worth telling


def _ask_slurm(sweep_dir: Path, rows: list[Row]) -> None:
    """Complete the rows of runs that neither train nor have ended by what became of their jobs."""
    asked = {row["run_id"]: row for row in rows if row["status"] in ("pending", "preempted", "interrupted")}
    told = explain(sweep_dir, {run_id: row["attempts"] > 0 for run_id, row in asked.items()})
    for run_id, job in told.items():
        row = asked[run_id]
        row["status"] = "failed" if job.failed else row["status"]
        row["error"] = f"{row['error']}; {job.text}" if row["error"] else job.text
        row["log"] = row["log"] or (None if job.log is None else str(job.log))


def begun_runs(sweep_dir: Path) -> dict[str, bool]:
    """Every run that was asked for or exists in `sweep_dir`, and whether it has a directory. Raises `UserError`."""
    require_sweep(sweep_dir)
    begun = {path.parent.name for path in sweep_dir.glob(f"*/{names.CONFIG}")}
    begun |= {path.name for path in sweep_dir.glob("[!._]*") if _is_closed(path)}
    study = read_study(sweep_dir)
    asked_for: list[str] = study["runs"] if study else []
    run_ids = dict.fromkeys([*asked_for, *sorted(begun)])
    if not run_ids:
        raise UserError(f"{sweep_dir} holds no runs")
    return {run_id: run_id in begun for run_id in run_ids}


def _is_closed(directory: Path) -> bool:
    """Whether another user made the directory and lets nobody look into it."""
    return directory.is_dir() and not os.access(directory, os.R_OK | os.X_OK)


def _row_or_problem(run_dir: Path, planned: Mapping[str, Any], begun: bool, packed: int) -> Row:
    """The row of a run; of one whose files are damaged a row that says so, so that the others are shown."""
    try:
        return _row(run_dir, planned, begun, packed)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"cannot read {error.filename or run_dir}: {error.strerror or error}"
    blank = dict.fromkeys(("host", "ends", "repeats", "took_s", "peak_memory_bytes", "log", *FACTS))
    known = {"planned_s": planned.get("train_s"), "planned_memory_bytes": planned.get("memory_bytes")}
    counted = {"attempts": 0, "restarts": 0, "together": packed, "notes": []}
    return {
        "run_id": run_dir.name,
        _SETTINGS: planned.get("settings", {}),
        "status": "failed",
        **blank,
        **known,
        **counted,
        "error": problem,
    }


def _row(run_dir: Path, planned: Mapping[str, Any], begun: bool, packed: int) -> Row:
    state = state_of(run_dir) if begun else RunState(run_dir.name, "pending", None)
    facts = state.result if state.result is not None else _live(run_dir, state, planned.get("tokens"))
    number = attempts(run_dir) if begun else 0
    together = facts.get("trained_together") or packed
    took_s = facts.get("wall_s")
    row = {
        "run_id": run_dir.name,
        _SETTINGS: _settings(run_dir, state, planned, begun),
        "status": state.status,
        **{key: facts.get(key) for key in FACTS},
        "attempts": number,
        "restarts": max(0, number - 1),
        "host": state.host,
        "ends": _expected_end(facts) if state.status == "running" else None,
        "together": together,
        "repeats": _repeats(facts) or planned.get("repeats"),
        "planned_s": planned.get("train_s"),
        "took_s": None if took_s is None else took_s / together,
        "planned_memory_bytes": planned.get("memory_bytes"),
        "peak_memory_bytes": facts.get("peak_memory_bytes"),
        "notes": read_notes(run_dir) if number else [],
        "log": None,
    }
    if state.status == "done":
        row["progress"] = 1.0
        if (row["fvu"] or 0.0) >= 1:
            row["notes"] = [*row["notes"], WORSE_THAN_THE_MEAN.format(row["fvu"])]
    elif number:
        log = _newest_log(run_dir, number)
        row["log"] = None if log is None else str(log)
        row["error"] = _what_happened(state, facts, log)
    return row


def _repeats(facts: Mapping[str, Any]) -> float | None:
    """What a result says; None before there is one."""
    tokens, unique = facts.get("tokens"), facts.get("unique_tokens")
    return tokens / unique if tokens and unique else None


def _live(run_dir: Path, state: RunState, tokens: float | None) -> dict[str, Any]:
    """What the metrics of an unfinished run say; `tokens` it will have trained on in the end, if the plan knows."""
    if state.status == "pending":
        return {}
    newest = metrics.last(run_dir / names.METRICS)
    if newest.get("tokens") and tokens:
        newest["progress"] = min(newest["tokens"] / tokens, 1.0)
    elif newest.get("tokens") and newest.get("flops"):
        train = read_config(run_dir).train
        shares = [newest["tokens"] / train.tokens] if train.tokens else []
        shares += [newest["flops"] / train.flops] if train.flops else []
        newest["progress"] = min(max(shares, default=0.0), 1.0)
    return newest


def _expected_end(newest: Mapping[str, Any]) -> str | None:
    """If it goes on as at the last log line."""
    share, tokens, rate = newest.get("progress"), newest.get("tokens"), newest.get("tokens_per_s")
    if not share or not tokens or not rate:
        return None
    left_s = tokens * (1 / share - 1) / rate
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=left_s)).isoformat(timespec="seconds")


def _newest_log(run_dir: Path, number: int) -> Path | None:
    """Log of the newest attempt; for a run of a pack the pack's, which its own names."""
    own = run_dir / names.ATTEMPTS / str(number) / names.LOG
    if not own.is_file():
        return None
    line = last_line(own)
    root = packs_root(run_dir.parent)
    if f"{root.name}/" not in line:
        return own
    # the path may be relative to where it was launched
    shared = root / line.rpartition(f"{root.name}/")[2]
    return shared if shared.is_file() else own


def _what_happened(state: RunState, facts: Mapping[str, Any], log: Path | None) -> str | None:
    """Why it failed, diverged or stopped, in a line."""
    if state.status == "diverged":
        return f"diverged at step {facts.get('diverged_at_step')}"
    if state.status == "failed":
        error, line = str(facts.get("error")), "" if log is None else last_line(log)
        return error if not line or line in error or error in line else f"{error} | {line}"
    if state.ended is None:
        return (
            None
            if state.status == "running"
            else "ended without a record (killed, left by a second Ctrl-C, or its machine was lost)"
        )
    step, outcome = state.ended.get("step"), state.ended.get("outcome")
    if step is None and outcome == "saved":
        return f"stopped before its first save: {state.ended.get('reason')}"
    at = f" at step {step}" if step is not None else ""
    return f"{outcome}{at}: {state.ended.get('reason')}"
