"""`--calibrate` with `cluster=slurm`: the same command as a job, so that steps are timed where the cells will run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from harness.config import ClusterConfig
from harness.errors import UserError
from harness.places.slurm.client import ABSENT
from harness.places.slurm.environment import job_environment
from harness.places.slurm.script import python_of, quoted, resources, srun_of


def calibrate_in_job(cluster: ClusterConfig, arguments: Sequence[str]) -> int:
    """Run `python -m harness.launch ARGUMENTS` as a job of one rank, and wait for it; what it says is shown.

    Returns its exit code. Raises `UserError` without Slurm.
    """
    if shutil.which("srun") is None:
        raise UserError(f"cannot call srun: {ABSENT}")
    launch = f"exec {python_of(cluster)} -m harness.launch {quoted(arguments)}"
    commands = "\n".join([*cluster.setup, launch])
    job = [*srun_of(cluster), *resources(cluster, 1), f"--time={cluster.time}", "--job-name=calibrate", *cluster.flags]
    return subprocess.run(
        [*job, "bash", "-c", commands], env=job_environment(os.environ), stdin=subprocess.DEVNULL
    ).returncode
