"""The scratch cluster itself: it runs jobs, refuses what it cannot run, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dev.slurm import processes
from dev.slurm.cluster import Cluster, SlurmError, missing, wait_for

pytestmark = pytest.mark.slurm


def test_two_ranks_run_and_their_output_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch(
        *("--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/out.txt"),
        *("--wrap", "srun bash -c 'echo rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME'"),
    )
    assert cluster.wait(job) == ["COMPLETED"]
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert sorted(lines) == ["rank 0 of 2 on n1", "rank 1 of 2 on n2"]


def test_a_job_of_higher_priority_displaces_one_that_then_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/bash\n"
        "echo start ${SLURM_RESTART_COUNT:-0}\n"
        '[ -n "$SLURM_RESTART_COUNT" ] && exit\n'
        "srun bash -c 'trap \"echo asked to stop; exit 0\" USR1; echo ready; sleep 100 & wait'\n"
        "scontrol requeue $SLURM_JOB_ID\n"
    )
    out = tmp_path / "out.txt"
    job = cluster.sbatch("--nodelist=n1", "--signal=USR1@10", "--open-mode=append", f"--output={out}", str(script))
    wait_for(lambda: out.exists() and "ready" in out.read_text(), 20, lambda: str(cluster.jobs(job)))
    high = cluster.preempt(nodes=("n1",))
    cluster.wait(high)
    cluster.start_now(job)
    assert cluster.wait(job) == ["COMPLETED"]
    lines = [line for line in out.read_text().splitlines() if not line.startswith(("srun", "slurmstepd"))]
    assert lines == ["start 0", "ready", "asked to stop", "start 1"]


def test_one_rank_is_killed_and_srun_ends_the_other(cluster: Cluster) -> None:
    job = cluster.sbatch("--array=3-4", "--ntasks=2", "--wrap", "srun --kill-on-bad-exit=1 sleep 100")
    ranks = wait_for(lambda: len(found := cluster.ranks(f"{job}_3")) == 2 and found, 20, lambda: str(cluster.jobs(job)))
    assert isinstance(ranks, dict)
    os.kill(ranks[1], signal.SIGKILL)
    assert cluster.wait(f"{job}_3") == ["FAILED"]
    assert cluster.states(f"{job}_4") == ["RUNNING"]


def test_what_cannot_run_is_refused_at_submission(cluster: Cluster) -> None:
    too_much = cluster.settings.memory_mb + 1
    for request in (f"--mem={too_much}", "--partition=nowhere", "--constraint=nothing", "--time=6 --partition=short"):
        with pytest.raises(SlurmError):
            cluster.sbatch(*request.split(), "--wrap", "true")
    assert cluster.squeue() == ""


def test_jobs_outlive_a_restart_of_the_controller(cluster: Cluster) -> None:
    job = cluster.sbatch("--wrap", "sleep 3")
    cluster.wait(job, {"RUNNING"})
    cluster.restart_controller()
    assert cluster.wait(job) == ["COMPLETED"]


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_nothing_is_left_when_the_owner_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from dev.slurm.cluster import running\n"
        "with running(Path(sys.argv[1])) as c:\n"
        "    c.wait(c.sbatch('--wrap', 'sleep 300'), {'RUNNING'}); print('up', flush=True); time.sleep(300)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"up\n"
        assert len(processes.members(tmp_path)) >= 5
        os.kill(owner.pid, signal.SIGKILL)
    wait_for(lambda: not processes.members(tmp_path), 15, lambda: str(processes.members(tmp_path)))
