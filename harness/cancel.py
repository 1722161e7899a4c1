"""`python -m harness.cancel runs/<sweep> [RUN_ID…]`: cancel the jobs of a sweep that are queued or running.

It cancels jobs on Slurm, and asks a launcher on this machine to save and stop. Saved work stays: a later launch goes on
from it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from harness.errors import UserError
from harness.places.slurm import client
from harness.places.slurm.queue import arrays, live_elements
from harness.process.claim import holder, is_here
from harness.record import names
from harness.record.rundir import claim_path
from harness.record.sweepdir import require_sweep
from harness.sweep.rows import begun_runs
from harness.terminal import Parser, path_argument, run_command, say


def cancel(sweep_dir: Path, run_ids: Collection[str]) -> Iterator[str]:
    """Cancel the named runs of a sweep, or all when none is named; yields a line per action. Raises `UserError`."""
    require_sweep(sweep_dir)
    if run_ids and (unknown := sorted(set(run_ids) - begun_runs(sweep_dir).keys())):
        raise UserError(f"{sweep_dir} has no run {unknown[0]}; `python -m harness.status {sweep_dir} --all` lists them")
    elements = list(live_elements(sweep_dir)) if arrays(sweep_dir) else []
    yield from _cancel_elements(elements, run_ids)
    # other jobs are allocations that somebody launched in
    own_jobs = {element.id for element, _ in elements}
    wanted = sorted(run_ids) or [path.parent.name for path in sorted(sweep_dir.glob(f"*/{names.CLAIM}"))]
    stopping: set[int] = set()
    for run_id in wanted:
        owner = holder(claim_path(sweep_dir / run_id))
        if owner is None or owner.job in own_jobs or owner.pid in stopping:
            continue
        if not is_here(owner):
            yield f"{run_id} is being trained by {owner}: cancel it there"
            continue
        stopping.add(owner.pid)
        try:
            os.kill(owner.pid, signal.SIGTERM)
            yield f"{owner} was asked to save and stop"
        except ProcessLookupError:
            continue  # it has just ended
        except PermissionError:
            yield f"{run_id} is being trained by {owner}, which belongs to another user: ask them to cancel it"


def _cancel_elements(elements: Sequence[tuple[client.Element, list[str]]], run_ids: Collection[str]) -> Iterator[str]:
    chosen = [(element, runs) for element, runs in elements if not run_ids or set(runs) & set(run_ids)]
    if chosen:
        client.call("scancel", *(element.id for element, _ in chosen))
    for element, runs in chosen:
        others = sorted(set(runs) - set(run_ids)) if run_ids else []
        together = f"; trained together with it and cancelled too: {', '.join(others)}" if others else ""
        yield (
            f"job {element.id} cancelled ({len(runs)} runs{together})"
            if runs
            else f"job {element.id} ({element.name}) cancelled"
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m harness.cancel", description="Cancel the jobs of a sweep.")
    parser.add_argument("sweep_dir", type=path_argument, metavar="runs/SWEEP")
    parser.add_argument("run_ids", nargs="*", metavar="RUN_ID", help="only these; default: all of the sweep")
    arguments = parser.parse_args(argv)
    try:
        lines = list(cancel(arguments.sweep_dir, arguments.run_ids))
    except UserError as error:
        say(f"error: {error}")
        return 2
    except client.SlurmError as error:
        say(f"error: {error}")
        return 1
    print("\n".join(lines) or "nothing queued or running")
    return 0


if __name__ == "__main__":
    run_command(main)
