"""This process as a Slurm task. Nothing else reads `SLURM_*`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


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
    """None outside a job."""
    env = os.environ if environment is None else environment
    if "SLURM_JOB_ID" not in env:
        return None
    in_step = "SLURM_STEP_ID" in env
    return SlurmTask(
        job_id=env["SLURM_JOB_ID"],
        array_job_id=env.get("SLURM_ARRAY_JOB_ID", ""),
        array_index=env.get("SLURM_ARRAY_TASK_ID", ""),
        restarts=env.get("SLURM_RESTART_COUNT", "0"),
        nodes=int(env.get("SLURM_NNODES", "1")),
        step_id=env.get("SLURM_STEP_ID", ""),
        step_tasks=int(env.get("SLURM_STEP_NUM_TASKS", "1")) if in_step else 1,
        step_nodes=int(env.get("SLURM_STEP_NUM_NODES", "1")),
        step_node_list=env.get("SLURM_STEP_NODELIST", ""),
        rank=int(env.get("SLURM_PROCID", "0")),
        local_rank=int(env.get("SLURM_LOCALID", "0")),
    )
