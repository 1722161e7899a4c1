"""What a job script calls on the compute node: `begin` before the ranks start, `end` after they are gone.

Without torch: both take a fraction of a second.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.activations.store.identity import is_complete, store_path
from harness.config import Config, from_container
from harness.files import write_json_atomic, write_text_atomic
from harness.places.slurm import client
from harness.record import rundir
from harness.record.attempt import END_TIME, write_ended
from harness.record.provenance import now
from harness.sweep.pack import Job, freeze_job, job_of
from harness.sweep.runs import Run, Store

SAME_STEP_FAILURES = 3
"""A job that fails so often at one saved step is given up."""

NEAR_THE_END_S = 120.0
"""Slurm's signal comes up to a minute early: a job stopped so shortly before its limit was stopped by it."""

BEGUN = "HARNESS_ATTEMPTS_BEFORE"
"""Environment variable of the script: attempts at the job before this start of it."""


def is_harvest(directory: Path) -> bool:
    """Whether an array makes a store; it then has one element and a `config.yaml` that says which."""
    return (directory / "config.yaml").is_file()


def job_at(directory: Path, index: int) -> Job:
    """Element `index` of an array, from its frozen configurations."""
    with (directory / "configs.jsonl").open(encoding="utf-8") as lines:
        line = next(line for number, line in enumerate(lines) if number == index)
    sweep_dir = directory.parents[1]
    runs = []
    for run_id, container in json.loads(line).items():
        config = from_container(container)
        store = Store(config.activations.store, None)
        runs.append(Run(run_id, config, run_id, sweep_dir / run_id, "pending", store))
    return job_of(runs)


def begin(directory: Path, index: int) -> str:
    """Make what the ranks need, and return what the script has to know as lines of shell."""
    if is_harvest(directory):
        home, config = directory, rundir.read_config(directory)
        todo = not is_complete(store_path(config.activations, Path(config.out)))
    else:
        job = job_at(directory, index)
        run_dirs = freeze_job(job)
        home, config = job.home, job.config
        todo = any(rundir.read_result(run_dir) is None for run_dir in run_dirs)
    store = store_path(config.activations, Path(config.out))
    settings = {"JOB": str(home) if todo else "", "STORE": str(store), BEGUN: str(rundir.attempts(home))}
    settings |= _meeting_point(config)
    _, ends = client.state(os.environ["SLURM_JOB_ID"])
    if ends is not None:
        settings[END_TIME] = str(ends)
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items())


def _meeting_point(config: Config) -> dict[str, str]:
    """Where ranks find rank 0: the node that runs this is the first of the job."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    one_node = int(os.environ.get("SLURM_NNODES", "1")) == 1
    address = config.cluster.master_addr or ("127.0.0.1" if one_node else socket.gethostname())
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def end(directory: Path, index: int, exit_code: int) -> int:
    """Decide how it goes on, and return the exit code of the job.

    Everything done: 0. Stopped and saved: the element is requeued. Failed: requeued too, until it has failed three
    times at one saved step; its runs are then `failed`, with the end of the log.
    """
    if is_harvest(directory):
        home, config = directory, rundir.read_config(directory)
        unfinished = [] if is_complete(store_path(config.activations, Path(config.out))) else [directory]
    else:
        job = job_at(directory, index)
        home, config = job.home, job.config
        unfinished = [run_dir for run_dir in freeze_job(job) if rundir.read_result(run_dir) is None]
    if not unfinished:
        return 0
    state = _own_state()
    attempts = _newest_attempts(home, unfinished)
    ended = _ended(attempts[0])
    step = rundir.saved_step(home)
    if state in ("CANCELLED", "PENDING"):  # by a person; by Slurm, which has requeued it already
        reason = "cancelled" if state == "CANCELLED" else "lost its node"
        write_ended(attempts, outcome="saved", reason=reason, step=step, requeued=state == "PENDING")
        return 0
    if ended is not None and ended["outcome"] == "saved":
        # the limit as it was at the start: of a job that is being preempted, Slurm says the end of its grace
        near_the_end = time.time() > float(os.environ.get(END_TIME, "inf")) - NEAR_THE_END_S
        reason = "time limit" if near_the_end or ended["reason"] == "time limit" else "preempted"
        write_ended(attempts, outcome="saved", reason=reason, step=step, requeued=True)
        _again(directory, index)
        return 0
    why = _log_end(home, exit_code)
    failures = _count_failures(directory, index, step)
    write_ended(attempts, outcome="failed", reason=why, step=step, requeued=failures < SAME_STEP_FAILURES)
    if failures < SAME_STEP_FAILURES:
        time.sleep(config.cluster.backoff_s * (2**failures - 1))
        _again(directory, index)
        return 0
    problem = RuntimeError(f"failed {failures} times at step {step or 0}: {why}")
    if home == directory:
        write_text_atomic(directory / "failed.txt", f"{problem}\n")
        return 1
    for run_dir in unfinished:
        rundir.write_failure(run_dir, rundir.read_config(run_dir), run_dir.name, problem, now(), now())
    return 1


def _own_state() -> str:
    try:
        return client.state(os.environ["SLURM_JOB_ID"])[0]
    except client.SlurmError:
        return "UNKNOWN"  # the controller is away; requeueing insists until it is back


def _newest_attempts(home: Path, unfinished: Sequence[Path]) -> list[Path]:
    """The attempts of this start of the job; made here when the ranks ended before they could."""
    begun = rundir.attempts(home) > int(os.environ[BEGUN])
    folders = [run_dir / "attempts" / str(rundir.attempts(run_dir) + (not begun)) for run_dir in unfinished]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if not begun and home not in unfinished:
        (home / "attempts" / str(rundir.attempts(home) + 1)).mkdir(parents=True)
    return folders


def _ended(attempt: Path) -> dict[str, Any] | None:
    path = attempt / "ended.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _log_end(home: Path, exit_code: int) -> str:
    """The last line that the attempt logged, for people."""
    log = home / "attempts" / str(rundir.attempts(home)) / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    told = f": {lines[-1][:300]}" if lines else ""
    return f"the ranks ended with exit code {exit_code}{told}"


def _count_failures(directory: Path, index: int, step: int | None) -> int:
    """How often in a row element `index` has failed at this saved step, the present failure included."""
    path = directory / f"failures-{index}.json"
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"step": step, "count": 0}
    count = earlier["count"] + 1 if earlier["step"] == step else 1
    write_json_atomic(path, {"step": step, "count": count})
    return count


def _again(directory: Path, index: int) -> None:
    """Let this element, and no other, start once more: requeue it, or submit it anew where a site forbids that."""
    try:
        client.insist("scontrol", "requeue", f"{os.environ['SLURM_ARRAY_JOB_ID']}_{index}")
    except client.SlurmError as error:
        if "pending" in str(error).lower():
            return  # Slurm has requeued it by itself
        if "disabled" not in str(error):
            raise
        client.insist("sbatch", "--parsable", f"--array={index}", str(directory / "job.sh"))
