"""`python -m harness.status runs/<sweep> [--json]`: what became of the runs of a sweep, from their files alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.jobs.columns import aligned, si
from harness.jobs.rundir import attempts, read_config
from harness.jobs.state import STATES, RunState, newest_metrics, state_of
from harness.record.notes import read_notes
from harness.record.progress import duration


def sweep_status(sweep_dir: Path) -> list[dict[str, Any]]:
    """One row per run that was asked for or exists in `sweep_dir`. Raises `UserError`.

    Keys: run_id, status, progress (share of the budget, None if unknown), tokens, fvu, fvu_se, dead_frac,
    tokens_per_s, wall_s, attempts, host (while it runs), notes (a list), error.
    """
    if not sweep_dir.is_dir():
        raise UserError(f"there is no sweep at {sweep_dir}; the sweeps are the directories in runs/ (or out=DIR)")
    found = {path.parent.name for path in sweep_dir.glob("*/config.yaml")}
    names = list(dict.fromkeys([*_asked_for(sweep_dir), *sorted(found)]))
    if not names:
        raise UserError(f"{sweep_dir} holds no runs")
    return [_row(sweep_dir / name) for name in names]


def _asked_for(sweep_dir: Path) -> list[str]:
    path = sweep_dir / "study.json"
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); launching the sweep again writes a new one") from error


def _row(run_dir: Path) -> dict[str, Any]:
    state = state_of(run_dir)
    known = state.result if state.result is not None else _live(run_dir, state)
    keys = ("progress", "tokens", "fvu", "fvu_se", "dead_frac", "tokens_per_s", "wall_s", "error")
    row = {"run_id": run_dir.name, "status": state.status, **{key: known.get(key) for key in keys}}
    if state.status == "done":
        row["progress"] = 1.0
    if state.status == "diverged":
        row["error"] = f"diverged at step {known.get('diverged_at_step')}"
    return {**row, "attempts": attempts(run_dir), "host": state.host, "notes": read_notes(run_dir)}


def _live(run_dir: Path, state: RunState) -> dict[str, Any]:
    """What the metrics of an unfinished run say."""
    if state.status == "pending":
        return {}
    newest = newest_metrics(run_dir)
    if newest.get("tokens") and newest.get("flops"):
        train = read_config(run_dir).train
        shares = [newest["tokens"] / train.tokens] if train.tokens else []
        shares += [newest["flops"] / train.flops] if train.flops else []
        newest["progress"] = min(max(shares, default=0.0), 1.0)
    return newest


def text(rows: Sequence[dict[str, Any]]) -> str:
    """The status as a table, errors below it, counts last."""
    table = [("run", "status", "progress", "fvu", "dead", "tok/s", "time", "host")]
    for row in rows:
        table.append(
            (
                row["run_id"],
                row["status"],
                _form(row["progress"], ".0%"),
                _form(row["fvu"], ".4f"),
                _form(row["dead_frac"], ".1%"),
                "-" if row["tokens_per_s"] is None else si(row["tokens_per_s"]),
                "-" if row["wall_s"] is None else duration(row["wall_s"]),
                row["host"] or "-",
            )
        )
    lines = aligned(table)
    lines += [f"{row['run_id']}: {row['error']}" for row in rows if row["error"]]
    lines += [f"{row['run_id']}: {note}" for row in rows for note in row["notes"]]
    counts = Counter(row["status"] for row in rows)
    lines.append(f"{len(rows)} runs: " + ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name]))
    return "\n".join(lines)


def _form(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m harness.status", description="What became of a sweep's runs.")
    parser.add_argument("sweep_dir", type=Path, metavar="runs/SWEEP")
    parser.add_argument("--json", action="store_true", help="a JSON list of runs instead of a table")
    arguments = parser.parse_args(argv)
    try:
        rows = sweep_status(arguments.sweep_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=2) if arguments.json else text(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
