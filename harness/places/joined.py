"""`srun python -m harness.launch …`: the ranks of the step train the grid together, one job after the other.

Rank 0 plans and writes the list of jobs; the others wait for it. Without this module each rank would launch the grid.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.errors import INTERRUPTED, WRONG_REQUEST, UserError
from harness.files import write_json_atomic
from harness.places.lines import Lines
from harness.places.local import ended_meanwhile
from harness.process.signals import Interrupted
from harness.process.slurm_task import SlurmTask, slurm_task
from harness.record.job import Job, freeze_job
from harness.record.provenance import command_line
from harness.schema import TEXT, fields, list_of, optional, read_json
from harness.terminal import say

POLL_S = 0.2
ANNOUNCED_S = 60.0
"""A plan that takes longer is announced by the ranks that wait for it."""
PLAN_TIMEOUT_S = 1800.0


def joined_task() -> SlurmTask | None:
    """This process as one of several tasks of an `srun` step, else None."""
    task = slurm_task()
    return task if task is not None and task.step_tasks > 1 else None


def _list_path(out: Path, task: SlurmTask) -> Path:
    """The same for all ranks of this launch, and another one for the next launch in the same step."""
    command = hashlib.sha256(command_line().encode("utf-8", "surrogateescape")).hexdigest()
    return out / "_joined" / f"{task.step_name}-{command[:8]}.json"


def announce(out: Path, task: SlurmTask, jobs: Sequence[Job]) -> None:
    """Freeze the jobs and tell the other ranks of them. Raises `UserError` when their mesh does not fit the step."""
    for job in jobs:
        mesh = job.config.mesh
        if mesh.ranks != task.step_tasks:
            raise UserError(
                f"srun started {task.step_tasks} ranks, but mesh.dp={mesh.dp} × mesh.shard={mesh.shard} + "
                f"mesh.lm={mesh.lm} needs {mesh.ranks}; set them, or the number of tasks of srun"
            )
    for job in jobs:
        ended_meanwhile(freeze_job(job))
    _write_list(out, task, [str(job.home) for job in jobs])


def give_up(out: Path, task: SlurmTask) -> None:
    """Tell the other ranks that there is nothing to do, because rank 0 raises."""
    _write_list(out, task, None)


def _write_list(out: Path, task: SlurmTask, homes: list[str] | None) -> None:
    path = _list_path(out, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, {"jobs": homes})


def lead(out: Path, task: SlurmTask, jobs: Sequence[Job], lines: Lines) -> int:
    """Train the announced jobs as rank 0. Returns 0, or the exit code of an interruption."""
    code = _train([job.home for job in jobs], lines.job_has_ended)
    if jobs:  # then all ranks have read the list
        _list_path(out, task).unlink()
    if code == INTERRUPTED:
        lines.stopped("a signal or the time limit", None)
    return code


def follow(out: Path, task: SlurmTask) -> int:
    """Wait for the list of rank 0, then train with it. Returns the exit code of the contract."""
    path, begun, said = _list_path(out, task), time.monotonic(), False
    while not path.exists():
        waited = time.monotonic() - begun
        if waited > PLAN_TIMEOUT_S:
            raise UserError(f"rank 0 has not written {path} within {PLAN_TIMEOUT_S:.0f} s; its output says why")
        if waited > ANNOUNCED_S and not said:
            say(f"rank {task.rank} is waiting for the plan of rank 0 of step {task.job_id}.{task.step_id}")
            said = True
        time.sleep(POLL_S)
    homes = read_json(path, fields({"jobs": optional(list_of(TEXT))}), "launch the step again")["jobs"]
    if homes is None:
        return WRONG_REQUEST
    return _train([Path(home) for home in homes], lambda job: None)


def _train(homes: Sequence[Path], on_ended: Callable[[Job], None]) -> int:
    from harness.training.jobs import train_jobs

    if not homes:
        return 0
    try:
        train_jobs(homes, on_ended=on_ended)
    except Interrupted:
        return INTERRUPTED
    return 0
