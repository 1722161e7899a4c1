"""Run runs one after the other in this process: each store is opened once, torch and the language model load once."""

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
from harness.record import rundir
from harness.record.attempt import attempt, claimed, write_provenance
from harness.record.provenance import now
from harness.sweep.pack import Job, freeze_job
from harness.sweep.runs import Run
from harness.terminal import Progress, duration, say

WAIT_S = 2.0
"""Between looks at a run that another process works on."""


class DiskFull(Exception):
    """No space: going on with other cells would only fail in the same way."""


def _is_disk_full(error: Exception) -> bool:
    """safetensors reports the operating system's errors as text in an exception of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and os.strerror(errno.ENOSPC) in str(error)


def run_jobs(jobs: Sequence[Job], ended: Sequence[Run] = ()) -> int:
    """Train what is not done, cheap cells first, and report each in a line. Returns the exit code of the contract.

    `ended` are runs that were done or had diverged before. A job that raises is recorded as failed and the others go
    on; one that failed earlier is tried again. A cell that another live process works on is left to it and waited for
    at the end.
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
        say(f"{counts['done']} of {len(statuses)} cells done" + _unlucky(counts))
    return 0 if counts["done"] == len(statuses) else FAILED


def _unlucky(counts: Counter[str]) -> str:
    parts = [f", {counts[name]} {name}" for name in ("diverged", "failed") if counts[name]]
    return "".join(parts)


def _run_all(jobs: Sequence[Job], ended: Sequence[Run], sources: dict[str, Any], stop: StopFlag) -> dict[Path, str]:
    """Status of every run by its directory. Raises `Interrupted`."""
    statuses = {run.run_dir: run.status for run in ended}
    total = len(ended) + sum(len(job.runs) for job in jobs)
    if ended:
        share = "all" if len(ended) == total else f"{len(ended)} of"
        diverged = sum(run.status == "diverged" for run in ended)
        what = f"have ended, {diverged} of them diverged" if diverged else "already done"
        say(f"{share} {total} cells {what}")
    if retried := sum(run.status == "failed" for job in jobs for run in job.runs):
        say(f"{retried} failed earlier and will be tried again")
    waiting, progress, elsewhere, told = deque(jobs), Progress(), 0, False
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
            if not told:
                cells = sum(len(job.runs) for job in waiting)
                say(f"{cells} cells are being trained by another process; waiting for it")
                told = True
            _wait(stop)
    return statuses


def _wait(stop: StopFlag) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not stop.requested:
        time.sleep(0.05)


def _claimed_run(job: Job, sources: dict[str, Any], stop: StopFlag, progress: Progress) -> dict[Path, str] | None:
    """Train the job unless a live process has one of its runs (then None). Returns the final status of each run."""
    try:
        run_dirs = freeze_job(job)
        with claimed(run_dirs):
            statuses = _ended_meanwhile(run_dirs)
            unfinished = [run_dir for run_dir in run_dirs if run_dir not in statuses]
            return statuses | _run(job, unfinished, sources, stop, progress) if unfinished else statuses
    except Claimed:
        return None
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise DiskFull(f"no space left on the device of {job.home.parent}") from error
        raise


def _ended_meanwhile(run_dirs: Sequence[Path]) -> dict[Path, str]:
    """The statuses of runs that ended since the plan was made; failures are set aside, to be tried again."""
    statuses = {}
    for run_dir in run_dirs:
        result = rundir.read_result(run_dir)
        if result is not None and result["status"] in rundir.FINAL:
            statuses[run_dir] = str(result["status"])
        elif result is not None:
            rundir.set_failure_aside(run_dir)
    return statuses


def _run(
    job: Job, unfinished: Sequence[Path], sources: dict[str, Any], stop: StopFlag, progress: Progress
) -> dict[Path, str]:
    from harness.training.run import Start, run_cells

    config, started = job.config, now()
    # several ranks open the source themselves, and harvest it together
    source = _source(job.runs[0], sources, stop) if config.mesh.dp * config.mesh.shard == 1 else None
    log = job.home / "attempts"
    mesh = {"dp": config.mesh.dp, "shard": config.mesh.shard}
    configs = {run_dir: rundir.read_config(run_dir) for run_dir in unfinished}
    try:
        with attempt(job.home, unfinished) as (log, numbers):
            store_id = job.runs[0].store.id
            provenance = write_provenance(unfinished, store_id=store_id, ops=config.ops, mesh=mesh)
            logging.getLogger("harness.attempt").info("on %s", provenance["machine"]["host"])
            begin = time.monotonic()
            if source is None:
                train_on_ranks(job.home, config, log.parent, stop)
            else:
                starts = [Start(run_dir, configs[run_dir], number) for run_dir, number in numbers.items()]
                run_cells(starts, job.home / "checkpoints", source, stop, progress)
    except Interrupted:
        progress.finish("")
        raise
    except Exception as error:
        if _is_disk_full(error):
            progress.finish("")
            raise
        progress.finish("")
        return {run_dir: _failed(run_dir, config, error, started, log, progress) for run_dir, config in configs.items()}
    seconds = time.monotonic() - begin
    return {run_dir: _done(run_dir, config, seconds, progress) for run_dir, config in configs.items()}


def _done(run_dir: Path, config: Config, seconds: float, progress: Progress) -> str:
    result = rundir.read_result(run_dir)
    assert result is not None, "training ended well, so the result was written"
    progress.finish(outcome_line(config, result, seconds))
    return str(result["status"])


def _failed(run_dir: Path, config: Config, error: Exception, started: str, log: Path, progress: Progress) -> str:
    """What a failure means for one run of the job: nothing if it had ended before."""
    if rundir.read_result(run_dir) is not None:
        return _done(run_dir, config, 0.0, progress)
    rundir.write_failure(run_dir, config, run_dir.name, error, started, now())
    progress.finish(f"{describe(config)}: FAILED: {rundir.describe(error)} (log: {log})")
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
