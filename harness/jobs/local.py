"""Run runs one after the other in this process: each store is opened once, torch and the language model load once."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from harness.errors import UserError
from harness.jobs import rundir
from harness.jobs.plan import Run
from harness.jobs.ranks import train_on_ranks
from harness.jobs.state import claim_path
from harness.record.claim import Claimed, claim
from harness.record.files import write_json_atomic
from harness.record.progress import Progress, duration
from harness.record.provenance import collect, command_line, now
from harness.record.signals import INTERRUPTED_EXIT_CODE, Interrupted, StopFlag, stop_on_signals

SOME_NOT_DONE = 1
WAIT_S = 2.0
"""Between looks at a run that another process works on."""


class DiskFull(Exception):
    """No space: going on with other cells would only fail in the same way."""


def _is_disk_full(error: Exception) -> bool:
    """safetensors reports the operating system's errors as text in an exception of its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and os.strerror(errno.ENOSPC) in str(error)


def run_jobs(runs: Sequence[Run]) -> int:
    """Train what is not done, cheap cells first, and report each in a line. Returns the exit code of the contract.

    A cell that raises is recorded as failed and the others go on; one that failed earlier is tried again. A cell that
    another live process works on is left to it and waited for at the end.
    """
    sources: dict[str, Any] = {}
    with stop_on_signals() as stop:
        try:
            statuses = _run_all(runs, sources, stop)
        except Interrupted:
            _say("interrupted; the same command goes on where it stopped")
            return INTERRUPTED_EXIT_CODE
        except DiskFull as full:
            _say(f"error: {full}; free some space and run the same command again, it goes on where it stopped")
            return SOME_NOT_DONE
    counts = Counter(statuses.values())
    if counts["done"] < len(runs) or any(run.status != "done" for run in runs):
        _say(f"{counts['done']} of {len(runs)} cells done" + _unlucky(counts))
    return 0 if counts["done"] == len(runs) else SOME_NOT_DONE


def _unlucky(counts: Counter[str]) -> str:
    parts = [f", {counts[name]} {name}" for name in ("diverged", "failed") if counts[name]]
    return "".join(parts)


def _run_all(runs: Sequence[Run], sources: dict[str, Any], stop: StopFlag) -> dict[str, str]:
    """Status of every run by run_id. Raises `Interrupted`."""
    statuses = {run.run_id: run.status for run in runs if run.status in rundir.FINAL}
    if statuses:
        share = "all" if len(statuses) == len(runs) else f"{len(statuses)} of"
        diverged = sum(status == "diverged" for status in statuses.values())
        what = f"have ended, {diverged} of them diverged" if diverged else "already done"
        _say(f"{share} {len(runs)} cells {what}")
    if retried := sum(run.status == "failed" for run in runs):
        _say(f"{retried} failed earlier and will be tried again")
    waiting = deque(run for run in runs if run.run_id not in statuses)
    progress, elsewhere, told = Progress(), 0, False
    while waiting:
        if stop.requested:
            raise Interrupted
        run = waiting.popleft()
        status = _claimed_run(run, sources, stop, progress)
        if status is not None:
            statuses[run.run_id] = status
            elsewhere = 0
            continue
        waiting.append(run)
        elsewhere += 1
        if elsewhere >= len(waiting):
            if not told:
                _say(f"{len(waiting)} cells are being trained by another process; waiting for it")
                told = True
            _wait(stop)
    return statuses


def _wait(stop: StopFlag) -> None:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and not stop.requested:
        time.sleep(0.05)


def _claimed_run(run: Run, sources: dict[str, Any], stop: StopFlag, progress: Progress) -> str | None:
    """Train the run unless a live process has it (then None). Returns its final status."""
    try:
        rundir.freeze(run.run_dir, run.config)
        with claim(claim_path(run.run_dir)):
            status = _finished(run)
            return _run(run, sources, stop, progress) if status is None else status
    except Claimed:
        return None
    except (OSError, SafetensorError) as error:
        if _is_disk_full(error):
            raise DiskFull(f"no space left on the device of {run.run_dir.parent}") from error
        raise


def _finished(run: Run) -> str | None:
    """The status of a run that ended since the plan was made; a failure is set aside, to be tried again."""
    result = rundir.read_result(run.run_dir)
    if result is None:
        return None
    if result["status"] in rundir.FINAL:
        return str(result["status"])
    rundir.set_failure_aside(run.run_dir)
    return None


def _run(run: Run, sources: dict[str, Any], stop: StopFlag, progress: Progress) -> str:
    from harness.train.run import run_cell

    config, started = run.config, now()
    # several ranks open the source themselves, and harvest it together
    source = _source(run, sources, stop) if config.mesh.dp * config.mesh.shard == 1 else None
    with_log = rundir.attempt_log(run.run_dir, f"{run.run_id}: {command_line()}")
    mesh = {"dp": config.mesh.dp, "shard": config.mesh.shard}
    try:
        with with_log as log:
            provenance = collect(store_id=run.store.id, ops=config.ops, mesh=mesh)
            write_json_atomic(run.run_dir / "provenance.json", provenance)
            logging.getLogger("harness.attempt").info("on %s", provenance["machine"]["host"])
            begin = time.monotonic()
            if source is None:
                train_on_ranks(run.run_dir, config, log.parent, stop)
                result = rundir.read_result(run.run_dir)
                assert result is not None, "all ranks ended well, so rank 0 wrote a result"
            else:
                result = run_cell(run.run_dir, config, source, stop, progress, rundir.attempts(run.run_dir))
    except Interrupted:
        progress.finish("")
        raise
    except Exception as error:
        if _is_disk_full(error):
            progress.finish("")
            raise
        rundir.write_failure(run.run_dir, config, run.run_id, error, started, now())
        progress.finish(f"{describe(run)}: FAILED: {rundir.describe(error)} (log: {log})")
        return "failed"
    progress.finish(outcome_line(run, result, time.monotonic() - begin))
    return str(result["status"])


def _source(run: Run, sources: dict[str, Any], stop: StopFlag) -> Any:
    """The open activation source of a run; harvested if it is missing. Raises `UserError`, `Interrupted`."""
    if run.store.id not in sources:
        from harness.activations import open_source

        try:
            sources[run.store.id] = open_source(run.config.activations, Path(run.config.out), progress=True, stop=stop)
        except OSError as error:
            if _is_disk_full(error):
                raise
            raise UserError(str(error)) from error
    return sources[run.store.id]


def describe(run: Run) -> str:
    """n, k, E and seed of a cell, in few characters."""
    sae = run.config.sae
    experts = f" E={sae.n_experts}" if sae.architecture == "switch" else ""
    return f"{sae.architecture} n={sae.n_latents} k={sae.k}{experts} seed={run.config.train.seed}"


def outcome_line(run: Run, result: dict[str, Any], seconds: float) -> str:
    """What came out of a cell: fvu ± standard error, dead share, speed, time."""
    if result["status"] == "diverged":
        return f"{describe(run)}: DIVERGED at step {result.get('diverged_at_step')} ({duration(seconds)})"
    parts = [_number("fvu", result.get("fvu"), ".4f")]
    if result.get("fvu_se") is not None:
        parts[0] += f" ± {result['fvu_se']:.4f}"
    parts.append(_number("dead", result.get("dead_frac"), ".1%"))
    parts.append(_number("", result.get("tokens_per_s"), ",.0f") + " tok/s")
    return f"{describe(run)}: {', '.join(parts)}, {duration(seconds)}"


def _number(name: str, value: float | None, spec: str) -> str:
    return f"{name} {'-' if value is None else format(value, spec)}".strip()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
