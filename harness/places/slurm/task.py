"""What a job script calls on its node: `begin` before the ranks start, `end` after they have ended.

Neither loads torch: both take a fraction of a second.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from harness.activations.store.paths import is_complete, store_path
from harness.config import Config, from_container
from harness.errors import INTERRUPTED, UserError
from harness.files import last_line, write_json_atomic, write_text_atomic
from harness.places.ranks import free_port
from harness.places.slurm import client
from harness.process.slurm_task import SlurmTask, slurm_task
from harness.record import names
from harness.record.attempt import END_TIME, read_ended, write_ended
from harness.record.job import Job, freeze_job, job_of
from harness.record.provenance import now
from harness.record.result import read_result, write_failure
from harness.record.run import frozen_run, read_run
from harness.record.rundir import attempts, read_config, saved_step
from harness.schema import fields, optional, read_json, whole

SAME_STEP_FAILURES = 3
"""After this many failures at one saved step the job is given up."""

NEAR_THE_END_S = 120.0
"""A job that stops this close to its time limit was stopped by the limit: the signal may come a minute early."""

BEGUN = "HARNESS_ATTEMPTS_BEFORE"
"""Environment variable of the script: how often the job was started before."""


def is_harvest(directory: Path) -> bool:
    """Whether an array makes a store. Then it has one element, and its `config.yaml` says which store."""
    return (directory / names.CONFIG).is_file()


def job_at(directory: Path, index: int) -> Job:
    """Element `index` of an array, from its frozen configurations."""
    with (directory / "configs.jsonl").open(encoding="utf-8") as lines:
        line = next(line for number, line in enumerate(lines) if number == index)
    sweep_dir = directory.parents[1]
    configs = {run_id: from_container(container) for run_id, container in json.loads(line).items()}
    return job_of([frozen_run(sweep_dir / run_id, config) for run_id, config in configs.items()])


def begin(directory: Path, index: int) -> str:
    """Freeze the element's runs, and return the script's variables as lines of shell."""
    if is_harvest(directory):
        home, config = directory, read_config(directory)
        todo = not is_complete(store_path(config.activations, Path(config.out)))
    else:
        job = freeze_job(job_at(directory, index))
        home, config = job.home, job.config
        todo = any(read_result(run_dir) is None for run_dir in job.run_dirs)
    store = store_path(config.activations, Path(config.out))
    settings = {"JOB": str(home) if todo else "", "STORE": str(store), BEGUN: str(attempts(home))}
    task = _task()
    settings |= _meeting_point(config, task)
    with suppress(client.SlurmError):  # a controller that does not answer now: Slurm's signal tells of the limit too
        if (ends := client.state(task.job_id).ends) is not None:
            settings[END_TIME] = str(ends)
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items())


def _task() -> SlurmTask:
    task = slurm_task()
    assert task is not None, "job scripts call this inside their job"
    return task


def _meeting_point(config: Config, task: SlurmTask) -> dict[str, str]:
    """Where ranks find rank 0: the node that runs this is the first of the job."""
    address = config.cluster.master_addr or ("127.0.0.1" if task.nodes == 1 else socket.gethostname())
    return {"MASTER_ADDR": address, "MASTER_PORT": str(free_port())}


def end(directory: Path, index: int, exit_code: int) -> int:
    """Decide what happens next, and return the exit code of the job.

    If everything is done: 0. If it was stopped and has saved, the element is requeued. If it failed, it is requeued
    too, until it has failed three times at one saved step; then its runs are `failed`, with the end of the log.
    """
    if is_harvest(directory):
        home, config = directory, read_config(directory)
        unfinished = [] if is_complete(store_path(config.activations, Path(config.out))) else [directory]
    else:
        job = freeze_job(job_at(directory, index))
        home, config = job.home, job.config
        unfinished = [run_dir for run_dir in job.run_dirs if read_result(run_dir) is None]
    if not unfinished:
        return 0
    state = own_state()
    newest = _newest_attempts(home, unfinished)
    ended = read_ended(newest[0])
    step = saved_step(home)
    if state in ("CANCELLED", "PENDING"):  # cancelled by a person; requeued by Slurm already
        reason = "cancelled" if state == "CANCELLED" else "lost its node"
        write_ended(newest, outcome="saved", reason=reason, step=step, requeued=state == "PENDING")
        return 0
    if ended is not None and ended["outcome"] == "saved":
        reason = "time limit" if _near_the_end() or ended["reason"] == "time limit" else "preempted"
        write_ended(newest, outcome="saved", reason=reason, step=step, requeued=True)
        again(directory, index)
        return 0
    why = log_end(home, exit_code)
    failures = _count_failures(directory, index, step)
    write_ended(newest, outcome="failed", reason=why, step=step, requeued=failures < SAME_STEP_FAILURES)
    if failures < SAME_STEP_FAILURES:
        time.sleep(config.cluster.backoff_s * (2**failures - 1))
        again(directory, index)
        return 0
    problem = RuntimeError(f"failed {failures} times at step {step or 0}: {why}")
    if home == directory:
        write_text_atomic(directory / "failed.txt", f"{problem}\n")
        return 1
    for run_dir in unfinished:
        write_failure(read_run(run_dir), problem, now())
    return 1


def evaluated(directory: Path, index: int, exit_code: int) -> int:
    """What follows the evaluation of an element; returns the exit code of the job. It is requeued if it was stopped,
    but not if a person cancelled it."""
    if exit_code != INTERRUPTED:
        return exit_code
    if own_state() not in ("CANCELLED", "PENDING"):
        again(directory, index)
    return 0


def _near_the_end() -> bool:
    """Whether the time limit is close. It was read at the start: while a job is being preempted, Slurm reports the end
    of its grace time instead."""
    return time.time() > float(os.environ.get(END_TIME, "inf")) - NEAR_THE_END_S


def own_state() -> str:
    """The state of this job. While its last processes end, Slurm says COMPLETING: without a preemption, a requeue or a
    time limit that means CANCELLED."""
    task = _task()
    try:
        job = client.state(task.job_id)
    except client.SlurmError:
        return "UNKNOWN"  # the controller does not answer; requeueing waits for it
    if job.state != "COMPLETING" or job.preempted or _near_the_end():
        return job.state
    return "PENDING" if job.restarts > int(task.restarts) else "CANCELLED"


def _newest_attempts(home: Path, unfinished: Sequence[Path]) -> list[Path]:
    """The attempts of this start of the job; made here if the ranks ended too early to make them."""
    begun = attempts(home) > int(os.environ[BEGUN])
    folders = [run_dir / names.ATTEMPTS / str(attempts(run_dir) + (not begun)) for run_dir in unfinished]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    if not begun and home not in unfinished:
        (home / names.ATTEMPTS / str(attempts(home) + 1)).mkdir(parents=True)
    return folders


def log_end(home: Path, exit_code: int) -> str:
    """Why the ranks ended: their exit code and the last line of the log."""
    log = home / names.ATTEMPTS / str(attempts(home)) / names.LOG
    line = last_line(log) if log.is_file() else ""
    return f"the ranks ended with exit code {exit_code}" + (f": {line[:300]}" if line else "")


def _count_failures(directory: Path, index: int, step: int | None) -> int:
    """How often in a row element `index` has failed at this saved step, this failure included."""
    path = directory / f"failures-{index}.json"
    try:
        earlier = read_json(path, fields({"step": optional(whole()), "count": whole()}), "")
    except (FileNotFoundError, UserError):
        earlier = {"step": step, "count": 0}
    count = earlier["count"] + 1 if earlier["step"] == step else 1
    write_json_atomic(path, {"step": step, "count": count})
    return count


def again(directory: Path, index: int) -> None:
    """Start this element once more: requeue it, or submit it anew where the site forbids requeueing."""
    try:
        client.insist("scontrol", "requeue", f"{_task().array_job_id}_{index}")
    except client.SlurmError as error:
        if "pending" in str(error).lower():
            return  # Slurm has requeued it by itself
        if "disabled" not in str(error):
            raise
        client.insist("sbatch", "--parsable", f"--array={index}", str(directory / "job.sh"))
