"""What of the environment of a launch reaches Slurm's commands, and through `sbatch` the jobs."""

from __future__ import annotations

import re
from collections.abc import Mapping

KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Where the cluster is, and how it knows the user."""

_OF_ANOTHER_JOB = re.compile(
    # an allocation or a step that the launch runs in, and defaults and filters of Slurm's commands
    r"(SLURM|SLURMD|SBATCH|SALLOC|SRUN|SQUEUE|SCANCEL|SCONTROL|SACCT|SINFO)_.*"
    r"|(PMI|PMI2|PMIX|OMPI|PRTE|MV2|PALS|FLUX)_.*"  # MPI's start of ranks
    # torchrun's, and ours of a job
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|HARNESS)_.*"
    r"|WANDB_(RUN_ID|RUN_NAME|NAME|RESUME|SWEEP_ID|SWEEP_PARAM_PATH|SERVICE|_SERVICE.*|AGENT_.*)|WANDB__.*"  # one run's
    r"|(CUDA|ROCR|HIP|ZE)_VISIBLE_DEVICES|ZE_AFFINITY_MASK|GPU_DEVICE_ORDINAL"  # GPUs of the launch's own node
)


def job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what describes another job, another group of ranks or another W&B run.

    People launch from an interactive allocation, from a notebook on a node, or from tmux inside `srun`. A job has its
    own values of these variables; and a filter of `squeue` would hide jobs that are queued.
    """
    return {name: value for name, value in environment.items() if name in KEPT or not _OF_ANOTHER_JOB.fullmatch(name)}


def ignored_defaults(environment: Mapping[str, str]) -> list[str]:
    """The `SBATCH_*` variables that somebody has set for `sbatch`, and that do not count here."""
    return sorted(name for name in environment if name.startswith("SBATCH_"))
