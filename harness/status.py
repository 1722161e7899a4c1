"""`python -m harness.status runs/<sweep>`: the state of every run of a sweep, read from its files alone.

Exit codes: 0, also if runs failed or Ctrl-C ended the watch; 2 for a wrong request.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from harness.cost.repeats import repeats_line
from harness.errors import UserError
from harness.places.slurm.explain import harvests_that_never_began
from harness.record.causes import cause_of
from harness.record.state import STATES
from harness.schema import read_text
from harness.sweep.rows import Row, sweep_rows
from harness.terminal import (
    Parser,
    can_redraw,
    duration,
    listed,
    own_screen,
    path_argument,
    run_command,
    say,
    si,
    table,
)

ENDED = ("done", "diverged", "failed")

WHOLE = 40
"""A sweep of at most this many runs is shown in full."""

SHOWN = {"failed": 15, "diverged": 10, "running": 20, "preempted": 10, "interrupted": 10, "pending": 3, "done": 3}
"""Status -> rows shown of a larger sweep."""

PROBLEMS = 15
"""Lines about problems, unless `--all` is given."""


HEADINGS = ("cell", "status", "progress", "fvu", "dead", "tok/s", "time", "planned", "restarts", "left", "host", "run")
OPTIONAL = ("planned", "restarts", "host", "tok/s", "dead", "time", "left", "run")
"""Columns that a narrow terminal does without, from the first on."""


def text(rows: Sequence[Row], whole: bool = False, harvests: Sequence[str] = ()) -> str:
    """The status as text for standard output: a table, what needs attention first; then the lines about `harvests` and
    the problems of the runs; the counts and the plan last.

    `whole`: every run and every problem, however many.
    """
    shown = sorted(rows, key=lambda row: STATES.index(row["status"]))
    if not whole and len(rows) > WHOLE:
        shown = [row for status in STATES for row in _first(shown, status)]
    lines = [table(HEADINGS, [_cells(row) for row in shown], left=("status", "host", "run"), optional=OPTIONAL)]
    if len(shown) < len(rows):
        hidden = Counter(row["status"] for row in rows)
        hidden.subtract(row["status"] for row in shown)
        lines.append(f"… and {len(rows) - len(shown)} more: {_counts(hidden)} (--all shows them)")
    lines += harvests
    problems = _problems(shown)
    lines += problems if whole else problems[:PROBLEMS]
    if not whole and len(problems) > PROBLEMS:
        lines.append(f"… and {len(problems) - PROBLEMS} more lines (--all shows them)")
    lines.append(f"{len(rows)} runs: {_counts(Counter(row['status'] for row in rows))}")
    lines += repeats_line((row["repeats"] for row in rows), "runs")
    return "\n".join([*lines, *_against_the_plan(rows)])


def _cells(row: Row) -> tuple[str, ...]:
    """One per heading."""
    return (
        _name(row),
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
        row["run_id"],
    )


def _name(row: Row) -> str:
    return row.get("cell") or row["run_id"]


def failed_harvests(sweep_dir: Path) -> list[str]:
    """One line per harvest job that failed for good: the cells that need its store cannot start."""
    lines = []
    for path in sorted(sweep_dir.glob("_slurm/*/failed.txt")):
        try:
            reason = read_text(path).strip()
        except (FileNotFoundError, UserError) as error:
            reason = str(error)
        lines.append(f"{path.parent.name}: {reason} (log: {path.parent}/log)")
    return lines + harvests_that_never_began(sweep_dir)


def _first(rows: Iterable[Row], status: str) -> list[Row]:
    return [row for row in rows if row["status"] == status][: SHOWN[status]]


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in reversed(STATES) if counts[name])


def _problems(rows: Sequence[Row]) -> list[str]:
    """A line for each error and for each note, with the runs that it is about."""
    cells: dict[str, list[str]] = {}
    for row in rows:
        for line in [*([_error(row)] if row["error"] else []), *row["notes"]]:
            cells.setdefault(line, []).append(_name(row))
    logs = {
        _error(row): row["log"]
        for row in reversed(rows)
        if row["log"] and row["status"] in ("failed", "interrupted", "pending")
    }
    lines = []
    for line, names in cells.items():
        where = f" (log: {logs[line]})" if line in logs else ""
        lines.append(f"{listed(names)}: {line}{where}")
    return lines


def _error(row: Row) -> str:
    """What went wrong, in the user's terms where they are known."""
    error = row["error"] or ""
    return cause_of(error).what if row["status"] == "failed" else error


def _against_the_plan(rows: Sequence[Row]) -> list[str]:
    """Planned and real time and memory of the runs that are done; planned time of the others."""
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
    """Median, smallest and largest ratio of real to planned."""
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
    """Show the status every `seconds` until every run has ended. Raises `UserError`, and `KeyboardInterrupt` on Ctrl-C.

    A terminal shows it in place, and the whole text at the end.
    """
    shown = ""
    texts = _texts(sweep_dir, seconds, whole)
    if not can_redraw(sys.stdout):
        for shown in texts:
            print(shown, flush=True)
        return
    # `kill` must give the first screen back, as Ctrl-C does
    on_sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with own_screen(sys.stdout) as show:
            for shown in texts:
                show(_cut(shown, shutil.get_terminal_size().lines))
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
        if shown:
            print(shown, flush=True)


def _texts(sweep_dir: Path, seconds: float, whole: bool) -> Iterator[str]:
    """The status now and every `seconds`, until every run has ended."""
    final: dict[str, Row] = {}
    while True:
        rows = sweep_rows(sweep_dir, final)
        yield text(rows, whole, failed_harvests(sweep_dir))
        if all(row["status"] in ENDED for row in rows):
            return
        time.sleep(seconds)


def _cut(shown: str, height: int) -> str:
    """The first lines and the last four, which are the sums, on `height` lines in all."""
    lines = shown.splitlines()
    return shown if len(lines) <= height else "\n".join([*lines[: height - 5], "…", *lines[-4:]])


def parser() -> argparse.ArgumentParser:
    result = Parser(prog="python -m harness.status", description="The state of every run of a sweep.")
    result.add_argument("sweep_dir", type=path_argument, metavar="runs/SWEEP")
    result.add_argument("--all", action="store_true", help="every run and every problem, however many")
    how = result.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="a JSON list of all runs instead of a table")
    how.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=10.0,
        metavar="SECONDS",
        help="show the table again every SECONDS (default 10) until every run has ended",
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
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    run_command(main)
