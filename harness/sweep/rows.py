"""The runs of a sweep as rows: how far each is, what went wrong, planned beside real. From the files alone."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import last_line
from harness.record import metrics, names
from harness.record.job import pack_sizes, packs_root
from harness.record.notes import read_notes
from harness.record.rundir import attempts, read_config
from harness.record.state import RunState, state_of
from harness.record.sweepdir import read_plan, read_study, require_sweep

Row = dict[str, Any]

FACTS = ("progress", "tokens", "fvu", "fvu_se", "dead_frac", "tokens_per_s", "wall_s", "error")


def sweep_rows(sweep_dir: Path, final: dict[str, Row] | None = None) -> list[Row]:
    """One row per run that was asked for or exists in `sweep_dir`. Raises `UserError`.

    Keys: run_id, status, progress (share of the budget), tokens, fvu, fvu_se, dead_frac, tokens_per_s, wall_s,
    attempts, restarts, host (while it runs), ends (expected, ISO 8601, while it runs), together (runs of its job),
    repeats (times that each row of the store is read), log (path), error (what went wrong, in a line), notes (a list),
    planned_s and took_s (steps and evaluations; in a pack its share), planned_memory_bytes, peak_memory_bytes. What is
    not known is None.

    `final` keeps the rows of runs that have ended from one call to the next: they are not read again.
    """
    begun = begun_runs(sweep_dir)
    planned, packed = read_plan(sweep_dir)["runs"], pack_sizes(sweep_dir)
    rows = []
    for name in begun:
        row = (final or {}).get(name)
        if row is None:
            row = _row(sweep_dir / name, planned.get(name, {}), begun[name], packed.get(name, 1))
            if final is not None and row["status"] in ("done", "diverged"):
                final[name] = row
        rows.append(row)
    return rows


def begun_runs(sweep_dir: Path) -> dict[str, bool]:
    """Every run that was asked for or exists in `sweep_dir`, and whether it has a directory. Raises `UserError`."""
    require_sweep(sweep_dir)
    begun = {path.parent.name for path in sweep_dir.glob(f"*/{names.CONFIG}")}
    study = read_study(sweep_dir)
    asked_for: list[str] = study["runs"] if study else []
    run_ids = dict.fromkeys([*asked_for, *sorted(begun)])
    if not run_ids:
        raise UserError(f"{sweep_dir} holds no runs")
    return {run_id: run_id in begun for run_id in run_ids}


def _row(run_dir: Path, planned: Mapping[str, Any], begun: bool, packed: int) -> Row:
    state = state_of(run_dir) if begun else RunState(run_dir.name, "pending", None)
    facts = state.result if state.result is not None else _live(run_dir, state, planned.get("tokens"))
    number = attempts(run_dir) if begun else 0
    together = facts.get("trained_together") or packed
    took_s = facts.get("wall_s")
    row = {
        "run_id": run_dir.name,
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
        return None if state.status == "running" else "ended without a record (killed, or its machine was lost)"
    at = f" at step {state.ended['step']}" if state.ended.get("step") is not None else ""
    return f"{state.ended.get('outcome')}{at}: {state.ended.get('reason')}"
