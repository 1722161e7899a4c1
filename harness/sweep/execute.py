"""From a request to an outcome: the runs are planned, written down, and trained here or on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.cost.estimate import Estimates, estimate
from harness.cost.jobs import cut_into_jobs
from harness.cost.repeats import repeats, repeats_line
from harness.cost.table import plan_text
from harness.errors import FAILED, INTERRUPTED
from harness.places import joined
from harness.places.lines import Lines
from harness.process.slurm_task import SlurmTask, slurm_task
from harness.record.result import FINAL, unfinished
from harness.record.run import Run
from harness.record.state import state_of
from harness.sweep.intent import record_intent
from harness.sweep.request import Request, plan_runs, requested_cells
from harness.sweep.rows import sweep_rows
from harness.sweep.runs import sweep_dirs_of
from harness.terminal import python_command, say, this_command

TOLD = 10
"""Runs that are named when a sweep that was waited for has ended."""


@dataclass(frozen=True)
class Outcome:
    exit_code: int
    sweep_dirs: tuple[Path, ...]
    """Where the runs are, one directory per `sweep=`."""
    submitted: bool = False
    """Whether the runs were left to a cluster."""


def launch(
    request: Request, *, dry_run: bool = False, wait: bool = False, calibrate: bool = False, command: str = ""
) -> Outcome:
    """Do what `request` asks for; with `dry_run` only show it. Raises `UserError` for a wrong request.

    `calibrate`: only time a few steps, for the plans of later launches; with Slurm in a job with the arguments of this
    process.

    `command` is what to type to go on after a stop, by default the command of this process.
    On a cluster the runs are submitted; with `wait` the call returns when they have ended. Ctrl-C counts as an
    interruption from the start, also while libraries load.
    """
    try:
        if calibrate:
            return _calibrate(request)
        task = joined.joined_task()
        if task is not None and not dry_run:
            return _join(request, task)
        runs = plan_runs(requested_cells(request), dry_run=dry_run)
        return carry_out(runs, request.about(), dry_run=dry_run, wait=wait, command=command)
    except KeyboardInterrupt:
        say(f"interrupted before anything was trained; to begin again: {command or this_command()}")
        return Outcome(INTERRUPTED, ())


def _calibrate(request: Request) -> Outcome:
    """Time a few steps of the cells where they will run, keep the times in `plan.json`, and show the plan."""
    task, cells = slurm_task(), requested_cells(request)
    cluster = cells[0].config.cluster
    if cluster.name == "slurm" and task is None:
        from harness.places.slurm.calibrate import calibrate_in_job

        return Outcome(calibrate_in_job(cluster, sys.argv[1:]), ())
    if task is not None and task.rank != 0:
        return Outcome(0, ())
    runs = plan_runs(cells, dry_run=False)
    estimates = estimate(runs, measure=True)
    record_intent(request.about(), runs, estimates)
    print(plan_text(runs, cut_into_jobs(unfinished(runs), estimates), estimates))
    return Outcome(FAILED if estimates.calibration.problem else 0, ())


def _join(request: Request, task: SlurmTask) -> Outcome:
    """Train as one of the ranks of an `srun` step."""
    cells = requested_cells(request)
    out = Path(cells[0].config.out)
    if task.rank != 0:
        return Outcome(joined.follow(out, task), ())  # the first rank speaks for all
    try:
        runs = plan_runs(cells, dry_run=False)
        estimates = estimate(runs)
        record_intent(request.about(), runs, estimates)
        jobs = cut_into_jobs(unfinished(runs), estimates)
        joined.announce(out, task, jobs)
    except BaseException:
        joined.give_up(out, task)
        raise
    lines = Lines(jobs, [run for run in runs if run.status in FINAL], estimates.job_seconds, this_command())
    lines.begin(harvest=False)
    code = joined.lead(out, task, jobs, lines)
    return Outcome(code or _judge(runs), sweep_dirs_of(runs))


def carry_out(runs: list[Run], about: Mapping[str, Any], *, dry_run: bool, wait: bool, command: str = "") -> Outcome:
    """Train named runs, here or on a cluster. `about` describes the request; it is empty for runs that the sweep
    knows. `command`: what to type to go on after a stop, by default the command of this process."""
    sweep_dirs = sweep_dirs_of(runs)
    estimates = estimate(runs)
    if dry_run:
        print(plan_text(runs, cut_into_jobs(unfinished(runs), estimates), estimates))
        return Outcome(0, sweep_dirs)
    record_intent(about, runs, estimates)
    for line in repeats_line(map(repeats, unfinished(runs))):
        say(f"note: {line}")
    if runs[0].config.cluster.name == "slurm":
        return _submit(runs, estimates, wait)
    from harness.places.local import run_jobs

    jobs = cut_into_jobs(unfinished(runs), estimates)
    ended = [run for run in runs if run.status in FINAL]
    return Outcome(run_jobs(jobs, ended, estimates.job_seconds, command), sweep_dirs)


def _submit(runs: list[Run], estimates: Estimates, wait: bool) -> Outcome:
    """Hand the runs to Slurm; with `wait`, come back when the queue is empty and judge the outcome."""
    from harness.places.slurm.queue import wait_for
    from harness.places.slurm.submit import submit_runs

    jobs, sweep_dirs = submit_runs(runs, estimates), sweep_dirs_of(runs)
    for directory in sweep_dirs if jobs else ():
        say(f"submitted; to follow it: {python_command('harness.status', directory, '--watch')}")
    if not wait:
        return Outcome(0, sweep_dirs, submitted=True)
    try:
        wait_for(runs)
    except KeyboardInterrupt:
        say("no longer waiting; the jobs go on")
        return Outcome(INTERRUPTED, sweep_dirs, submitted=True)
    _say_what_went_wrong(runs)
    return Outcome(_judge(runs), sweep_dirs)


def _say_what_went_wrong(runs: list[Run]) -> None:
    """A line per run that is not done, with the path of its log."""
    own = {run.run_id for run in runs}
    rows = [row for directory in sweep_dirs_of(runs) for row in sweep_rows(directory) if row["run_id"] in own]
    wrong = [row for row in rows if row["status"] != "done" and row["error"]]
    for row in wrong[:TOLD]:
        say(f"{row['run_id']}: {row['error']}" + (f" (log: {row['log']})" if row["log"] else ""))
    if len(wrong) > TOLD:
        say(f"… and {len(wrong) - TOLD} more; python -m harness.status tells")


def _judge(runs: list[Run]) -> int:
    """Say how many runs are done; the exit code."""
    done = sum(state_of(run.run_dir).status == "done" for run in runs)
    say(f"{done} of {len(runs)} cells done")
    return 0 if done == len(runs) else FAILED
