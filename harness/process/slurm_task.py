"""This process as a Slurm task. Nothing else reads `SLURM_*`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import psutil

from harness.errors import UserError


class SlurmTask(NamedTuple):
    """What the environment of a job, or of a task of an `srun` step, says."""

    job_id: str
    array_job_id: str
    """Empty outside an array."""
    array_index: str
    """Empty outside an array."""
    restarts: str
    """How often Slurm has requeued the job."""
    nodes: int
    """Of the job."""
    step_id: str
    """Empty outside an `srun` step."""
    step_tasks: int
    """Tasks of the step; 1 outside of one."""
    step_nodes: int
    step_node_list: str
    """As Slurm writes it: `node[1-4,7]`."""
    rank: int
    """Of this task in its step."""
    local_rank: int
    """Of this task on its node."""

    @property
    def name(self) -> str:
        """The job as Slurm's commands name it: `123`, or `120_4` for an element of an array."""
        return f"{self.array_job_id}_{self.array_index}" if self.array_job_id and self.array_index else self.job_id

    @property
    def step_name(self) -> str:
        """The same for all tasks of a step, and another one after a requeue."""
        return f"{self.job_id}.{self.step_id or '0'}.{self.restarts}"

    def meeting_point(self) -> tuple[str, int]:
        """Address and port at which the ranks of the step meet: its first node, and a port that follows from the
        step."""
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", self.step_node_list)
        address = f"{first[1]}{first[2] or ''}" if self.step_nodes > 1 and first else "127.0.0.1"
        return address, 20_000 + (int(self.job_id) * 31 + int(self.step_id)) % 20_000


def slurm_task(environment: Mapping[str, str] | None = None) -> SlurmTask | None:
    """None outside a job. The shell of `srun --pty` is task 0 alone, and what is started in it is one process. Raises
    `UserError` for variables that are no numbers."""
    env = os.environ if environment is None else environment
    if not env.get("SLURM_JOB_ID"):
        return None
    in_step = bool(env.get("SLURM_STEP_ID")) and not ("SLURM_PTY_PORT" in env and _in_shell_of_terminal())
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        number(env, name, 0)  # they are kept as text, and calculated with
    return SlurmTask(
        job_id=env["SLURM_JOB_ID"],
        array_job_id=env.get("SLURM_ARRAY_JOB_ID", ""),
        array_index=env.get("SLURM_ARRAY_TASK_ID", ""),
        restarts=env.get("SLURM_RESTART_COUNT", "0"),
        nodes=number(env, "SLURM_NNODES", 1),
        step_id=env.get("SLURM_STEP_ID", "") if in_step else "",
        step_tasks=number(env, "SLURM_STEP_NUM_TASKS", 1) if in_step else 1,
        step_nodes=number(env, "SLURM_STEP_NUM_NODES", 1),
        step_node_list=env.get("SLURM_STEP_NODELIST", ""),
        rank=number(env, "SLURM_PROCID", 0) if in_step else 0,
        local_rank=number(env, "SLURM_LOCALID", 0) if in_step else 0,
    )


def number(environment: Mapping[str, str], name: str, default: int) -> int:
    """An environment variable as a number of 0 or more; the default if it is missing or empty. Raises `UserError`."""
    text = environment.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,10}", text):
        raise UserError(f"{name}={text!r} in the environment is not a number; unset it, or start again with srun")
    return int(text)


def _in_shell_of_terminal() -> bool:
    """Whether this process was started by hand in a terminal, not by Slurm. SLURM_PTY_PORT cannot tell: a step that is
    started from the shell of `srun --pty` inherits it, but its tasks have no terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    parent = psutil.Process().parent()
    return parent is None or not parent.name().startswith("slurmstepd")
