"""`srun python -m harness.launch …`: the ranks of the step train the grid together, one job after the other.

Rank 0 plans, freezes and writes down the list; the others wait for it. Without this each rank would launch the grid.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.errors import FAILED, INTERRUPTED, WRONG_REQUEST, UserError
from harness.files import write_json_atomic
from harness.places.local import describe, outcome_line
from harness.process.signals import Interrupted
from harness.record import rundir
from harness.sweep.pack import Job, Target, freeze_job
from harness.terminal import say

POLL_S = 0.2
PLAN_TIMEOUT_S = 1800.0


def step_ranks() -> int:
    """Ranks of the `srun` step that this process belongs to; 1 outside of one."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1


def step_rank() -> int:
    return int(os.environ.get("SLURM_PROCID", "0"))


def _list_path(out: Path) -> Path:
    """The same for all ranks of one step, another one after a requeue."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return out / "_joined" / f"{'.'.join(os.environ.get(name, '0') for name in names)}.json"


def lead(out: Path, plan: Callable[[], Sequence[Job]], all_done: Callable[[], bool]) -> int:
    """What rank 0 does: plan, tell the others, train. Returns the exit code of the contract."""
    path = _list_path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        jobs = plan()
        ranks = step_ranks()
        for job in jobs:
            mesh = job.config.mesh
            if mesh.dp * mesh.shard != ranks:
                raise UserError(
                    f"srun started {ranks} ranks, but mesh.dp={mesh.dp} × mesh.shard={mesh.shard} needs "
                    f"{mesh.dp * mesh.shard}; set mesh.dp and mesh.shard, or the number of tasks of srun"
                )
        for job in jobs:
            for run_dir in freeze_job(job):
                result = rundir.read_result(run_dir)
                if result is not None and result["status"] not in rundir.FINAL:
                    rundir.set_failure_aside(run_dir)
    except BaseException:
        write_json_atomic(path, {"jobs": None})
        raise
    write_json_atomic(path, {"jobs": [str(job.home) for job in jobs]})
    code = _train([job.home for job in jobs], _told)
    if jobs:  # then all ranks have read it
        path.unlink()
    if code == INTERRUPTED:
        say("interrupted; the same command goes on where it stopped")
        return code
    return 0 if all_done() else FAILED


def follow(out: Path) -> int:
    """What the other ranks do: wait for the list, then train with rank 0."""
    path, end = _list_path(out), time.monotonic() + PLAN_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > end:
            raise UserError(f"rank 0 has not written {path} within {PLAN_TIMEOUT_S:.0f} s; its output says why")
        time.sleep(POLL_S)
    homes = json.loads(path.read_text(encoding="utf-8"))["jobs"]
    if homes is None:
        return WRONG_REQUEST
    return _train([Path(home) for home in homes], lambda target: None)


def _train(homes: Sequence[Path], told: Callable[[Target], None]) -> int:
    from harness.training.jobs import train_jobs

    if not homes:
        return 0
    try:
        train_jobs(homes, told=told)
    except Interrupted:
        return INTERRUPTED
    return 0


def _told(target: Target) -> None:
    for run_dir in target.run_dirs:
        config, result = rundir.read_config(run_dir), rundir.read_result(run_dir)
        line = describe(config) if result is None else outcome_line(config, result, result.get("wall_s") or 0.0)
        say(line)
