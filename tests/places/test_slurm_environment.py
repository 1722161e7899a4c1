"""What the shell that launches has left behind reaches neither Slurm's commands nor the jobs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness.places.slurm import client
from harness.places.slurm.environment import ignored_defaults, job_environment

LEFT_BEHIND = (
    # of an allocation or a step
    *("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_MEM_PER_CPU", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_PROCID"),
    *("SLURM_CPU_BIND", "SLURM_EXPORT_ENV", "SLURM_TIME_FORMAT", "SLURM_PTY_PORT", "SLURMD_NODENAME", "SLURM_CLUSTERS"),
    # defaults and filters of the commands
    *("SBATCH_TIMELIMIT", "SBATCH_PARTITION", "SBATCH_EXPORT", "SALLOC_ACCOUNT", "SRUN_CPUS_PER_TASK"),
    *("SQUEUE_STATES", "SQUEUE_PARTITION", "SQUEUE_FORMAT", "SCANCEL_STATE", "SCANCEL_INTERACTIVE", "SINFO_FORMAT"),
    # other people's ways to start ranks
    *("PMI_RANK", "PMI2_PMI_FD", "PMIX_RANK", "PMIX_NAMESPACE", "OMPI_COMM_WORLD_RANK", "PRTE_LAUNCHED"),
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
    # one W&B run, the launch's own GPUs, a job of ours
    *("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_RESUME", "WANDB_SERVICE", "WANDB__SERVICE_WAIT"),
    *("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HARNESS_END_TIME", "HARNESS_ATTEMPTS_BEFORE"),
)

KEPT = (
    *("SLURM_CONF", "SLURM_JWT", "PATH", "HOME", "USER", "LANG", "VIRTUAL_ENV", "PYTHONPATH", "TMPDIR", "HF_HOME"),
    *(
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "NCCL_DEBUG",
        "GLOO_SOCKET_IFNAME",
        "CUDA_LAUNCH_BLOCKING",
        "HYDRA_FULL_ERROR",
    ),
    *("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_TAGS", "WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL"),
    *("MY_RANK", "RANKED", "MASTERS", "XSLURM_JOB_ID", "slurm_job_id"),
)


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_left_behind(name: str) -> None:
    assert job_environment({name: "1", "HOME": "/h"}) == {"HOME": "/h"}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    assert job_environment({name: "1"}) == {name: "1"}


def test_defaults_for_sbatch_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ignored_defaults({"SBATCH_TIMELIMIT": "1", "SLURM_CONF": "c", "SBATCH_ACCOUNT": "a"}) == [
        "SBATCH_ACCOUNT",
        "SBATCH_TIMELIMIT",
    ]


@pytest.mark.parametrize("name", ["sbatch", "squeue", "scancel", "scontrol", "sacct"])
def test_every_command_gets_the_cleaned_environment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / name
    command.write_text("#!/bin/sh\nenv\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for variable in LEFT_BEHIND:
        monkeypatch.setenv(variable, "1")
    seen = {line.partition("=")[0] for line in client.call(name).splitlines()}
    assert "PATH" in seen and not seen & set(LEFT_BEHIND)
