"""What a real Slurm makes of odd paths, of the shell that launches, and of jobs that never begin."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dev.slurm.cluster import Cluster, wait_for
from tests.slurm.runs import command

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

CELL = (
    *("activations=synthetic", "activations.heldout_tokens=2048", "train.tokens=20e3", "train.batch_tokens=256"),
    *("sae=topk", "sae.n_latents=64", "sae.k=4", "tracker=none"),
)
ON_SLURM = (
    *("cluster=slurm", "cluster.gpus_per_task=0", "cluster.cpus_per_task=1", "cluster.mem=1500M"),
    *("cluster.network_interface=lo", "cluster.backoff_s=1"),
)


def test_a_launch_from_inside_an_allocation(cluster: Cluster, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "harness.launch",
        *CELL,
        *ON_SLURM,
        f"out={tmp_path}",
        "sweep=s",
        "cluster.time='10'",
    ]
    left_behind = {
        "SBATCH_TIMELIMIT": "1",
        "RANK": "0",
        "WORLD_SIZE": "4",
        "SQUEUE_STATES": "RUNNING",
        "PMIX_RANK": "3",
    }
    done = subprocess.run(
        ["salloc", "-n1", "--mem-per-cpu=800M", "--cpus-per-task=1", "-t", "5", *launch, "--wait"],
        env=cluster.env() | {"OMP_NUM_THREADS": "1"} | left_behind,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "SBATCH_TIMELIMIT do not count here" in done.stderr
    (job_id,) = re.findall(r"job (\d+): 1 cells", done.stderr)
    assert cluster.jobs(job_id)[0]["TimeLimit"] == "00:10:00"


def test_paths_and_names_with_any_character(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / """50%j it's a "b" ü #1 $;&|"""
    quoted = str(out).replace("'", "\\'")
    done = command(cluster, "harness.launch", *CELL, *ON_SLURM, f"out='{quoted}'", "sweep='p%j'", "--wait")
    assert done.returncode == 0, done.stderr
    assert len(list(out.glob("p%j/_slurm/*/log/*_0.out"))) == 1


def test_a_job_that_never_began_is_told_with_its_reason(cluster: Cluster, tmp_path: Path) -> None:
    hold = "cluster.flags=[--hold]"
    submitted = command(cluster, "harness.launch", *CELL, *ON_SLURM, hold, f"out={tmp_path}", "sweep=s")
    assert submitted.returncode == 0, submitted.stderr
    (array,) = (tmp_path / "s" / "_slurm").glob("*/")
    told = command(cluster, "harness.status", str(tmp_path / "s")).stdout
    assert "waits: it is held" in told and "1 runs: 1 pending" in told
    shutil.rmtree(array / "log")
    (array / "log").touch()  # its output cannot be opened
    (job_id,) = re.findall(r"job (\d+): ", submitted.stderr)
    cluster.scontrol("release", job_id)
    cluster.wait(job_id)
    told = command(cluster, "harness.status", str(tmp_path / "s")).stdout
    assert f"job {job_id}_0 never began: Slurm could not start its script" in told
    assert "JobLaunchFailure), exit code 0:53" in told and "1 runs: 1 failed" in told
    # the same launch tries it again
    again = command(cluster, "harness.launch", *CELL, *ON_SLURM, f"out={tmp_path}", "sweep=s", "--wait")
    assert again.returncode == 0, again.stderr
    assert "1 runs: 1 done" in command(cluster, "harness.status", str(tmp_path / "s")).stdout


def test_a_job_that_ends_before_training_is_told_with_the_end_of_its_log(cluster: Cluster, tmp_path: Path) -> None:
    wrong = "cluster.python=/nowhere/python"
    done = command(cluster, "harness.launch", *CELL, *ON_SLURM, wrong, f"out={tmp_path}", "sweep=s", "--wait")
    assert done.returncode == 1
    (log,) = tmp_path.glob("s/_slurm/*/log/*_0.out")
    told = command(cluster, "harness.status", str(tmp_path / "s")).stdout
    for text in (done.stderr, told):
        assert "/nowhere/python: No such file or directory" in text and f"(log: {log})" in text
    assert "1 runs: 1 failed" in told


def test_the_shell_of_a_step_with_a_terminal_is_one_process(cluster: Cluster, tmp_path: Path) -> None:
    # typed into the shell of task 0; that of the other task has no input and ends
    command_line = f"{sys.executable} -m harness.launch {' '.join(CELL)} out={tmp_path} sweep=s"
    inner = f"[ $SLURM_PROCID = 0 ] || exit 0; {command_line}; exit $?"
    step = f"srun -n2 --mem=2000M --pty bash -c '{inner}'"
    done = subprocess.run(
        ["script", "--quiet", "--return", "--command", step, "/dev/null"],
        env=cluster.env() | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert len(list(tmp_path.glob("s/*/result.json"))) == 1, done.stdout


def test_a_launch_in_an_allocation_can_be_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    cell = [*CELL, "train.tokens=1e9", f"out={tmp_path}", "sweep=s"]
    process = subprocess.Popen(
        ["salloc", "-n1", "--mem=1000M", sys.executable, "-m", "harness.launch", *cell],
        env=cluster.env() | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: any(tmp_path.glob("s/*/metrics.jsonl")), 60, lambda: "it does not train")
    assert "was asked to save and stop" in command(cluster, "harness.cancel", str(tmp_path / "s")).stdout
    assert "interrupted" in process.communicate(timeout=60)[1] and process.returncode == os.EX_TEMPFAIL
    assert "asked to stop (SIGTERM)" in command(cluster, "harness.status", str(tmp_path / "s")).stdout
