"""A rehearsal of a job on this machine: a few steps in processes of its own, a stop, and the rest from the save."""

from __future__ import annotations

import io

from harness.errors import UserError
from harness.places.ranks import RankFailed, train_on_ranks
from harness.process.signals import Interrupted, StopFlag
from harness.progress import Progress
from harness.record.attempt import attempt
from harness.record.causes import cause_of
from harness.record.job import Job, freeze_job
from harness.record.result import describe, read_result
from harness.record.rundir import saved_step

STEPS = 4
"""Steps of a rehearsal. Evaluated after 2 and 3, and at the end on all held-out rows."""
STOP_AFTER = 2
"""The first start stops after so many: one rank at once, several after one more."""


def rehearse_here(job: Job, stop: StopFlag) -> str:
    """Train a short job in two starts. Returns why that failed, in a line; empty if it did not.

    Raises `Interrupted` when `stop` is set.
    """
    try:
        freeze_job(job)
        _start(job, stop, "--stop-after", str(STOP_AFTER))
        if saved_step(job.home) is None:
            return "the first start left no checkpoint"
        _start(job, stop)
    except RankFailed as error:
        return in_a_line(error.short)
    except (OSError, UserError) as error:
        return in_a_line(describe(error))
    return ""


def _start(job: Job, stop: StopFlag, *arguments: str) -> None:
    """One start of the ranks, until the end of the job or to where `arguments` let it stop."""
    with attempt(job.home, job.run_dirs) as (log, _):
        try:
            train_on_ranks(job.home, job.config, log.parent, stop, Progress(io.StringIO()), arguments)
        except Interrupted:
            if stop.requested:
                raise


def in_a_line(error: str) -> str:
    """An error with what it means to a user and what to do about it."""
    cause = cause_of(error)
    return f"{cause.what}; {cause.advice}" if cause.advice else cause.what


def unfit(job: Job) -> str:
    """What is wrong with the outcome of a short job whose starts all ended well; empty if nothing is."""
    for run in job.runs:
        result = read_result(run.run_dir)
        if result is None:
            return "it ended without a result"
        if result["status"] != "done":
            return f"it ended as {result['status']} at step {result.get('diverged_at_step')} of {STEPS}"
        if result["attempts"] < 2:
            return "it was not stopped and started again"
        refused = [note for note in result.get("notes", ()) if "refused" in note]
        if refused:
            return f"it did not go on from its save: {refused[0]}"
    return ""
