"""Train jobs one after the other on this machine. This process opens each store once and loads torch once."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness.activations.store.paths import is_complete, store_path
from harness.errors import FAILED, INTERRUPTED, UserError
from harness.places.lines import Lines
from harness.places.ranks import train_on_ranks
from harness.process.claim import Claimed
from harness.process.signals import Interrupted, StopFlag, stop_on_signals
from harness.record import names
from harness.record.attempt import attempt, attempt_dirs, claimed, write_ended, write_provenance
from harness.record.job import Job, freeze_job
from harness.record.provenance import now
from harness.record.result import FINAL, read_result, set_failure_aside, write_failure
from harness.record.result import describe as describe_error
from harness.record.run import Run
from harness.record.rundir import freeze_other_hooks, saved_step
from harness.terminal import this_command

WAIT_S = 2.0
"""Between two looks at a run that another process trains."""


class DiskFull(Exception):
    """No space is left in a directory: other cells would fail in the same way."""

    def __init__(self, place: Path) -> None:
        super().__init__(f"no space left on the device of {place}")
        self.place = place


def _is_disk_full(error: Exception) -> bool:
    """Whether an error means a full disk; safetensors wraps the system's errors as text in an exception of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and os.strerror(errno.ENOSPC) in str(error)


def run_jobs(
    jobs: Sequence[Job],
    ended: Sequence[Run] = (),
    seconds: Callable[[Job], float | None] = lambda job: None,
    command: str = "",
) -> int:
    """Train the jobs, cheap ones first, and report each run in a line. Returns the exit code of the contract.

    `ended` are the runs that ended before; `seconds` is the plan of a job, None if unknown; `command` is what to type
    to go on. If a job raises, its runs are recorded as failed and the others go on; runs that failed earlier are tried
    again. Runs that another live process trains are left to it, and waited for at the end.
    """
    with stop_on_signals() as stop:
        local = _Local(jobs, ended, Lines(jobs, ended, seconds, command or this_command()), stop)
        try:
            local.run_all()
        except Interrupted:
            local.lines.stopped(stop.reason, local.saved)
            return INTERRUPTED
        except DiskFull as full:
            local.lines.disk_full(full.place)
            return FAILED
    statuses = local.statuses
    done = all(status == "done" for status in statuses.values())
    if not done or jobs:
        local.lines.summary(statuses)
    return 0 if done else FAILED


class _Local:
    """One launch on this machine."""

    def __init__(self, jobs: Sequence[Job], ended: Sequence[Run], lines: Lines, stop: StopFlag) -> None:
        self.lines, self.statuses = lines, {run.run_dir: run.status for run in ended}
        self.saved: Job | None = None
        """The job that was in training when a stop was asked for."""
        self._jobs, self._stop = jobs, stop
        self._sources: dict[str, Any] = {}

    def run_all(self) -> None:
        """Train every job or see it ended by another process. Raises `Interrupted`, `DiskFull`."""
        self.lines.begin(any(_is_missing(job) for job in self._jobs))
        waiting, elsewhere, announced = deque(self._jobs), 0, False
        while waiting:
            if self._stop.requested:
                raise Interrupted
            job = waiting.popleft()
            owner = self._claimed_run(job)
            if owner is None:
                elsewhere = 0
                continue
            waiting.append(job)
            elsewhere += 1
            if elsewhere >= len(waiting):
                if not announced:
                    self.lines.waiting(sum(len(job.runs) for job in waiting), owner.owner)
                    announced = True
                _wait(self._stop)

    def _claimed_run(self, job: Job) -> Claimed | None:
        """Train the job, unless a live process has one of its runs: then that is returned."""
        try:
            job = freeze_job(job)
            with claimed(job.run_dirs):
                before = ended_meanwhile(job)
                self.statuses |= before
                self.lines.ended_elsewhere(before)
                unfinished = Job(tuple(run for run in job.runs if run.run_dir not in before), job.home)
                if unfinished.runs:
                    self._train(unfinished)
        except Claimed as by:
            return by
        except (OSError, SafetensorError) as error:
            if _is_disk_full(error):
                raise DiskFull(job.home.parent) from error
            raise
        return None

    def _train(self, job: Job) -> None:
        """Train the job, here or on ranks of its own. A failure is recorded, not raised."""
        from harness.training.run import train_job

        config, started, lines, stop = job.config, now(), self.lines, self._stop
        # several ranks open the source themselves, and harvest it together
        source = self._source(job.runs[0]) if config.mesh.ranks == 1 else None
        log, numbers = job.home / names.ATTEMPTS, {}
        mesh = {"dp": config.mesh.dp, "shard": config.mesh.shard}
        begin = time.monotonic()
        lines.job_begins(job)
        try:
            with attempt(job.home, job.run_dirs) as (log, numbers):
                provenance = write_provenance(job.run_dirs, store_id=job.runs[0].store.id, ops=config.ops, mesh=mesh)
                logging.getLogger("harness.attempt").info("on %s", provenance["machine"]["host"])
                if source is None:
                    freeze_other_hooks(job.home, config, [other.config for other in self._jobs])
                    train_on_ranks(job.home, config, log.parent, stop, lines.progress)
                else:
                    train_job(job, source, stop, lines.progress)
        except Interrupted:
            lines.progress.finish("")
            self.saved = job
            step = saved_step(job.home)
            write_ended(attempt_dirs(numbers), outcome="saved", reason=stop.reason, step=step, requeued=False)
            raise
        except Exception as error:
            lines.progress.finish("")
            if _is_disk_full(error):
                raise
            lines.job_ends()
            for run in job.runs:
                self._failed(run, error, started, log)
            return
        lines.job_ends()
        for run in job.runs:
            self._done(run, time.monotonic() - begin)

    def _done(self, run: Run, seconds: float) -> None:
        result = read_result(run.run_dir)
        assert result is not None, "training ended well, so the result was written"
        self.statuses[run.run_dir] = str(result["status"])
        self.lines.ended(run, result, seconds)

    def _failed(self, run: Run, error: Exception, started: str, log: Path) -> None:
        """What a failure means for one run of the job: nothing if it had ended before."""
        if read_result(run.run_dir) is not None:
            self._done(run, 0.0)
            return
        write_failure(run, error, started)
        self.statuses[run.run_dir] = "failed"
        self.lines.failed(run, describe_error(error), log)

    def _source(self, run: Run) -> Any:
        """The open activation source of a run; harvested if it is missing. Raises `UserError`, `Interrupted`."""
        if run.store.id not in self._sources:
            from harness.activations.open import open_source

            activations, out = run.config.activations, Path(run.config.out)
            others = [job.config.activations for job in self._jobs]
            try:
                self._sources[run.store.id] = open_source(
                    activations, out, progress=True, stop=self._stop, others=others
                )
            except OSError as error:
                if _is_disk_full(error):
                    raise
                raise UserError(str(error)) from error
        return self._sources[run.store.id]


def _is_missing(job: Job) -> bool:
    """Whether the activations that a job needs have to be harvested first."""
    activations = job.config.activations
    return activations.kind != "synthetic" and not is_complete(store_path(activations, Path(job.config.out)))


def _wait(stop: StopFlag) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not stop.requested:
        time.sleep(0.05)


def ended_meanwhile(job: Job) -> dict[Path, str]:
    """The statuses of runs that ended since the plan was made; failures are set aside, to be tried again."""
    statuses = {}
    for run_dir in job.run_dirs:
        result = read_result(run_dir)
        if result is not None and result["status"] in FINAL:
            statuses[run_dir] = str(result["status"])
        elif result is not None:
            set_failure_aside(run_dir)
    return statuses
