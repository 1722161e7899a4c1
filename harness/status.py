"""`python -m harness.status runs/<sweep>`: what became of the runs of a sweep, from their files alone.

Exit codes: 0, also when some runs failed or the watch was ended by Ctrl-C; 2 for a wrong request.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.errors import UserError
from harness.record.state import STATES
from harness.sweep.rows import Row, sweep_rows
from harness.terminal import aligned, duration, si

ENDED = ("done", "diverged", "failed")

WHOLE = 40
"""A sweep of at most this many runs is shown whole."""

SHOWN = {"failed": 15, "diverged": 10, "running": 20, "preempted": 10, "interrupted": 10, "pending": 3, "done": 3}
"""Rows of a larger one, by status."""

PROBLEMS = 15
"""Lines about what went wrong, unless all are asked for."""


def text(rows: Sequence[Row], whole: bool = False, besides: Sequence[str] = ()) -> str:
    """The status as a table, what needs attention first; what went wrong below it (`besides` the runs first), counts
    and the plan last."""
    shown = sorted(rows, key=lambda row: STATES.index(row["status"]))
    if not whole and len(rows) > WHOLE:
        shown = [row for status in STATES for row in _first(shown, status)]
    table = [("run", "status", "progress", "fvu", "dead", "tok/s", "time", "planned", "restarts", "left", "host")]
    for row in shown:
        table.append(
            (
                row["run_id"],
                row["status"],
                _form(row["progress"], ".0%"),
                _form(row["fvu"], ".4f"),
                _form(row["dead_frac"], ".1%"),
                "-" if row["tokens_per_s"] is None else si(row["tokens_per_s"]),
                _duration(row["took_s"]),
                _duration(row["planned_s"]),
                str(row["restarts"] or "-"),
                _left(row["ends"]),
                row["host"] or "-",
            )
        )
    lines = aligned(table)
    if len(shown) < len(rows):
        hidden = Counter(row["status"] for row in rows)
        hidden.subtract(row["status"] for row in shown)
        lines.append(f"… and {len(rows) - len(shown)} more: {_counts(hidden)} (--all shows them)")
    lines += besides
    problems = [line for row in shown for line in _problem(row)]
    lines += problems if whole else problems[:PROBLEMS]
    if not whole and len(problems) > PROBLEMS:
        lines.append(f"… and {len(problems) - PROBLEMS} more lines (--all shows them)")
    lines.append(f"{len(rows)} runs: {_counts(Counter(row['status'] for row in rows))}")
    return "\n".join([*lines, *_beside_the_plan(rows)])


def failed_harvests(sweep_dir: Path) -> list[str]:
    """What became of harvest jobs that were given up: the cells that wait for their stores cannot start."""
    found = sorted(sweep_dir.glob("_slurm/*/failed.txt"))
    return [
        f"{path.parent.name}: {path.read_text(encoding='utf-8').strip()} (log: {path.parent}/log)" for path in found
    ]


def _first(rows: Iterable[Row], status: str) -> list[Row]:
    return [row for row in rows if row["status"] == status][: SHOWN[status]]


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in reversed(STATES) if counts[name])


def _problem(row: Row) -> list[str]:
    """What went wrong in a run, and what its record says beside its numbers."""
    where = f" (log: {row['log']})" if row["log"] and row["status"] == "failed" else ""
    lines = [f"{row['run_id']}: {row['error']}{where}"] if row["error"] else []
    return lines + [f"{row['run_id']}: {note}" for note in row["notes"]]


def _beside_the_plan(rows: Sequence[Row]) -> list[str]:
    """What was planned and what it took, of the runs that are done; what is left by plan."""
    lines = []
    done = [row for row in rows if row["status"] == "done"]
    if pairs := _pairs(done, "planned_s", "took_s"):
        planned, took = (sum(side) for side in zip(*pairs, strict=True))
        lines.append(f"{len(pairs)} done: planned {duration(planned)}, took {duration(took)} ({_ratios(pairs)})")
    if pairs := _pairs(done, "planned_memory_bytes", "peak_memory_bytes"):
        planned, peak = (max(side) for side in zip(*pairs, strict=True))
        lines.append(f"memory: planned at most {si(planned)}B, took at most {si(peak)}B ({_ratios(pairs)})")
    left = [row for row in rows if row["status"] not in ENDED and row["planned_s"] is not None]
    if left:
        seconds = sum(row["planned_s"] * (1 - (row["progress"] or 0.0)) for row in left)
        lines.append(f"left: {len(left)} runs, {duration(seconds)} of training by plan, one after the other")
    return lines


def _pairs(rows: Iterable[Row], planned: str, real: str) -> list[tuple[float, float]]:
    return [(row[planned], row[real]) for row in rows if row[planned] and row[real]]


def _ratios(pairs: Sequence[tuple[float, float]]) -> str:
    """How much of the plan a run took, in the middle and at the ends."""
    ratios = sorted(real / planned for planned, real in pairs)
    return f"per run {statistics.median(ratios):.2f} of the plan, {ratios[0]:.2f} to {ratios[-1]:.2f}"


def _form(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _duration(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _left(ends: str | None) -> str:
    if ends is None:
        return "-"
    return duration((datetime.datetime.fromisoformat(ends) - datetime.datetime.now(datetime.UTC)).total_seconds())


def watch(sweep_dir: Path, seconds: float, whole: bool) -> None:
    """Show the status again and again until every run has ended, or somebody presses Ctrl-C. Raises `UserError`."""
    final: dict[str, Row] = {}
    terminal = sys.stdout.isatty()
    while True:
        rows = sweep_rows(sweep_dir, final)
        shown = text(rows, whole, failed_harvests(sweep_dir))
        if terminal:
            # what does not fit would scroll away at every turn; the sums at the end are kept
            height = shutil.get_terminal_size().lines - 2
            lines = shown.splitlines()
            cut = lines if len(lines) <= height else [*lines[: height - 5], "…", *lines[-4:]]
            print("\x1b[H\x1b[J" + "\n".join(cut), flush=True)
        else:
            print(shown, flush=True)
        if all(row["status"] in ENDED for row in rows):
            return
        time.sleep(seconds)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m harness.status", description="What became of a sweep's runs.")
    result.add_argument("sweep_dir", type=Path, metavar="runs/SWEEP")
    result.add_argument("--all", action="store_true", help="every run and every problem, however many")
    how = result.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="a JSON list of all runs instead of a table")
    how.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="show it again every SECONDS (default 10) until all runs have ended",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        if arguments.watch is not None:
            watch(arguments.sweep_dir, max(0.1, arguments.watch), arguments.all)
        elif arguments.json:
            print(json.dumps(sweep_rows(arguments.sweep_dir), indent=2))
        else:
            print(text(sweep_rows(arguments.sweep_dir), arguments.all, failed_harvests(arguments.sweep_dir)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
