"""Train jobs one after the other on this machine. This process opens each store once and loads torch once."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness.config import Config
from harness.errors import FAILED, INTERRUPTED, UserError
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
from harness.record.rundir import saved_step
from harness.terminal import Progress, duration, say

WAIT_S = 2.0
"""Between two looks at a run that another process trains."""


class DiskFull(Exception):
    """No space is left: other cells would fail in the same way."""


def _is_disk_full(error: Exception) -> bool:
    """Whether an error means a full disk; safetensors wraps the system's errors as text in an exception of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and os.strerror(errno.ENOSPC) in str(error)


def run_jobs(jobs: Sequence[Job], ended: Sequence[Run] = ()) -> int:
    """Train the jobs, cheap ones first, and report each run in a line. Returns the exit code of the contract.

    `ended` are the runs that ended before. If a job raises, its runs are recorded as failed and the others go on; runs
    that failed earlier are tried again. Runs that another live process trains are left to it, and waited for at the
    end.
    """
    sources: dict[str, Any] = {}
    with stop_on_signals() as stop:
        try:
            statuses = _run_all(jobs, ended, sources, stop)
        except Interrupted:
            say("interrupted; the same command goes on where it stopped")
            return INTERRUPTED
        except DiskFull as full:
            say(f"error: {full}; free some space and run the same command again, it goes on where it stopped")
            return FAILED
    counts = Counter(statuses.values())
    if counts["done"] < len(statuses) or any(run.status != "done" for job in jobs for run in job.runs):
        unlucky = "".join(f", {counts[name]} {name}" for name in ("diverged", "failed") if counts[name])
        say(f"{counts['done']} of {len(statuses)} cells done{unlucky}")
    return 0 if counts["done"] == len(statuses) else FAILED


def _run_all(jobs: Sequence[Job], ended: Sequence[Run], sources: dict[str, Any], stop: StopFlag) -> dict[Path, str]:
    """Run directory → status. Raises `Interrupted`."""
    statuses = {run.run_dir: run.status for run in ended}
    total = len(ended) + sum(len(job.runs) for job in jobs)
    if ended:
        share = "all" if len(ended) == total else f"{len(ended)} of"
        diverged = sum(run.status == "diverged" for run in ended)
        what = f"have ended, {diverged} of them diverged" if diverged else "already done"
        say(f"{share} {total} cells {what}")
    if retried := sum(run.status == "failed" for job in jobs for run in job.runs):
        say(f"{retried} failed earlier and will be tried again")
    waiting, progress, elsewhere, announced = deque(jobs), Progress(), 0, False
    while waiting:
        if stop.requested:
            raise Interrupted
        job = waiting.popleft()
        outcome = _claimed_run(job, sources, stop, progress)
        if outcome is not None:
            statuses |= outcome
            elsewhere = 0
            continue
        waiting.append(job)
        elsewhere += 1
        if elsewhere >= len(waiting):
            if not announced:
                cells = sum(len(job.runs) for job in waiting)
                say(f"{cells} cells are being trained by another process; waiting for it")
                announced = True
            _wait(stop)
    return statuses


def _wait(stop: StopFlag) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not stop.requested:
        time.sleep(0.05)


def _claimed_run(job: Job, sources: dict[str, Any], stop: StopFlag, progress: Progress) -> dict[Path, str] | None:
    """Train the job unless a live process has one of its runs (then None). Returns the final status of each run."""
    try:
        job = freeze_job(job)
        with claimed(job.run_dirs):
            statuses = ended_meanwhile(job)
            unfinished = Job(tuple(run for run in job.runs if run.run_dir not in statuses), job.home)
            return statuses | _train(unfinished, sources, stop, progress) if unfinished.runs else statuses
    except Claimed:
        return None
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise DiskFull(f"no space left on the device of {job.home.parent}") from error
        raise


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


def _train(job: Job, sources: dict[str, Any], stop: StopFlag, progress: Progress) -> dict[Path, str]:
    """Train the job, here or on ranks of its own. Returns the status of each run; a failure is recorded, not raised."""
    from harness.training.run import train_job

    config, started = job.config, now()
    # several ranks open the source themselves, and harvest it together
    source = _source(job.runs[0], sources, stop) if config.mesh.ranks == 1 else None
    log, numbers = job.home / names.ATTEMPTS, {}
    mesh = {"dp": config.mesh.dp, "shard": config.mesh.shard}
    try:
        with attempt(job.home, job.run_dirs) as (log, numbers):
            provenance = write_provenance(job.run_dirs, store_id=job.runs[0].store.id, ops=config.ops, mesh=mesh)
            logging.getLogger("harness.attempt").info("on %s", provenance["machine"]["host"])
            begin = time.monotonic()
            if source is None:
                train_on_ranks(job.home, config, log.parent, stop)
            else:
                train_job(job, source, stop, progress)
    except Interrupted:
        progress.finish("")
        step = saved_step(job.home)
        write_ended(attempt_dirs(numbers), outcome="saved", reason=stop.reason, step=step, requeued=False)
        raise
    except Exception as error:
        progress.finish("")
        if _is_disk_full(error):
            raise
        return {run.run_dir: _failed(run, error, started, log, progress) for run in job.runs}
    seconds = time.monotonic() - begin
    return {run.run_dir: _done(run, seconds, progress) for run in job.runs}


def _done(run: Run, seconds: float, progress: Progress) -> str:
    result = read_result(run.run_dir)
    assert result is not None, "training ended well, so the result was written"
    progress.finish(outcome_line(run.config, result, seconds))
    return str(result["status"])


def _failed(run: Run, error: Exception, started: str, log: Path, progress: Progress) -> str:
    """What a failure means for one run of the job: nothing if it had ended before."""
    if read_result(run.run_dir) is not None:
        return _done(run, 0.0, progress)
    write_failure(run, error, started)
    progress.finish(f"{describe(run.config)}: FAILED: {describe_error(error)} (log: {log})")
    return "failed"


def _source(run: Run, sources: dict[str, Any], stop: StopFlag) -> Any:
    """The open activation source of a run; harvested if it is missing. Raises `UserError`, `Interrupted`."""
    if run.store.id not in sources:
        from harness.activations.open import open_source

        try:
            sources[run.store.id] = open_source(run.config.activations, Path(run.config.out), progress=True, stop=stop)
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise UserError(str(error)) from error
    return sources[run.store.id]


def describe(config: Config) -> str:
    """n, k, E and seed of a cell, in few characters."""
    sae = config.sae
    experts = f" E={sae.n_experts}" if sae.architecture == "switch" else ""
    return f"{sae.architecture} n={sae.n_latents} k={sae.k}{experts} seed={config.train.seed}"


def outcome_line(config: Config, result: dict[str, Any], seconds: float) -> str:
    """What came out of a cell: fvu ± standard error, dead share, speed, time."""
    if result["status"] == "diverged":
        return f"{describe(config)}: DIVERGED at step {result.get('diverged_at_step')} ({duration(seconds)})"
    parts = [_number("fvu", result.get("fvu"), ".4f")]
    if result.get("fvu_se") is not None:
        parts[0] += f" ± {result['fvu_se']:.4f}"
    parts.append(_number("dead", result.get("dead_frac"), ".1%"))
    parts.append(_number("", result.get("tokens_per_s"), ",.0f") + " tok/s")
    return f"{describe(config)}: {', '.join(parts)}, {duration(seconds)}"


def _number(name: str, value: float | None, spec: str) -> str:
    return f"{name} {'-' if value is None else format(value, spec)}".strip()
