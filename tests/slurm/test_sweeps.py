"""Sweeps on a real Slurm: they end with the results of one process, whatever is done to their jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dev.slurm.cluster import FINISHED, Cluster, running, wait_for
from dev.slurm.settings import Settings
from harness.launch import main
from harness.record.result import read_result
from harness.record.rundir import attempts
from harness.sweep.rows import sweep_rows
from tests.slurm.runs import command, repeated_steps, wait_for_step
from tests.slurm.sweeps import CLUSTER, SYNTHETIC, array_id, locally, runs_of, submit, wait_for_results
from tests.training.ranks import same_weights

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SWITCH = ("sae=switch", "sae.n_experts=4", "sae.balance_weight=0.1")


def assert_undisturbed(out: Path, reference: Path) -> None:
    """Every run is done, has the weights of the undisturbed sweep bit by bit, and no step twice."""
    runs = runs_of(reference)
    assert runs
    for undisturbed in runs:
        run_dir = out / "s" / undisturbed.name
        assert (read_result(run_dir) or {}).get("status") == "done", run_dir
        assert same_weights(run_dir, undisturbed)
        assert repeated_steps(run_dir) == []


def reasons(run_dir: Path) -> list[str]:
    return [json.loads(path.read_text())["reason"] for path in sorted((run_dir / "attempts").glob("*/ended.json"))]


def test_a_grid_over_two_nodes_gives_the_results_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    grid = ("sae.n_latents=32,64", "train.tokens=40960")
    mesh = ("mesh.dp=2", "mesh.shard=2", "cluster.tasks_per_node=2", "cluster.mem=4000M")
    submit(cluster, tmp_path / "slurm", "sae=topk", *grid, *mesh)
    submit(cluster, tmp_path / "slurm", *SWITCH, *grid, *mesh)
    results = wait_for_results(tmp_path / "slurm", 4)
    locally(cluster, tmp_path / "local", "sae=topk", *grid)
    locally(cluster, tmp_path / "local", *SWITCH, *grid)
    for run_dir in runs_of(tmp_path / "local"):
        one, four = read_result(run_dir), results[run_dir.name]
        assert one is not None and four["status"] == "done"
        assert four["fvu"] == pytest.approx(one["fvu"], rel=1e-4)
        assert (four["trained_together"], one["trained_together"]) == (2, 1)
    script = next((tmp_path / "slurm" / "s" / "_slurm").glob("*/job.sh")).read_text()
    assert "#SBATCH --nodes=2" in script and "#SBATCH --ntasks=4" in script
    # a laptop's results and the cluster's are the same runs
    assert "2 have ended" in submit(cluster, tmp_path / "local", "sae=topk", *grid, *mesh)


def test_preempted_cells_go_on_bit_for_bit(cluster: Cluster, tmp_path: Path) -> None:
    """Two nodes with a job of two ranks each, displaced twice: four preemptions in training."""
    length = ("sae.n_latents=64", "train.tokens=7e5", "mesh.shard=2", "train.checkpoint_every_s=1")
    for kind in (("sae=topk",), SWITCH):
        locally(cluster, tmp_path / "b", *kind, *length)
    for kind in (("sae=topk",), SWITCH):
        submit(cluster, tmp_path / "a", *kind, *length, "cluster.pack=1", "cluster.mem=4000M")
    run_dirs = [tmp_path / "a" / "s" / path.name for path in runs_of(tmp_path / "b")]
    for step in (60, 800):
        for run_dir in run_dirs:
            wait_for_step(run_dir, step, 180)
        cluster.wait(cluster.preempt(), FINISHED, 120)
        rows = {row["run_id"]: row["status"] for row in sweep_rows(tmp_path / "a" / "s")}
        assert set(rows.values()) <= {"preempted", "running", "done"} and "preempted" in rows.values()
    wait_for_results(tmp_path / "a", 2)
    assert_undisturbed(tmp_path / "a", tmp_path / "b")
    told = [reason for run_dir in run_dirs for reason in reasons(run_dir)]
    assert told.count("preempted") >= 3  # one may have ended before the second


def test_preempted_while_saving(cluster: Cluster, tmp_path: Path) -> None:
    """A save after every step: the signals come in the middle of one."""
    cells = (
        "sae=topk",
        "sae.n_latents=1024",
        "train.seed=0,1",
        "train.tokens=128000",
        "train.checkpoint_every_steps=1",
    )
    locally(cluster, tmp_path / "b", *cells)
    submit(cluster, tmp_path / "a", *cells, "cluster.pack=2")
    job = array_id(tmp_path / "a")
    for step in (40, 200):
        wait_for_step(tmp_path / "a" / "s" / runs_of(tmp_path / "b")[0].name, step)
        cluster.wait(cluster.preempt(), FINISHED, 120)
    wait_for_results(tmp_path / "a", 2)
    assert_undisturbed(tmp_path / "a", tmp_path / "b")
    assert cluster.restarts(job) >= 2


def test_a_harvest_is_a_job_and_survives_preemption(cluster: Cluster, tmp_path: Path) -> None:
    lm = ("activations=minilm", "activations.tokens=60000", "activations.heldout_tokens=4000", "activations.lm_batch=8")
    cells = ("sae=topk", "sae.n_latents=64", "train.tokens=40960", *lm)
    said = submit(cluster, tmp_path / "a", *cells, "cluster.mem=3500M", f"cluster.stage_dir={tmp_path / 'node'}")
    harvest = array_id(tmp_path / "a", "harvest")
    assert f"job {harvest} harvests" in said
    assert "Dependency" in cluster.scontrol("show", "job", array_id(tmp_path / "a"))
    for _ in range(2):
        wait_for(
            lambda: any((tmp_path / "a" / "_activations").glob("*.partial/*")) or not cluster.squeue(),
            120,
            lambda: cluster.squeue(),
        )
        cluster.wait(cluster.preempt(), FINISHED, 90)
    wait_for_results(tmp_path / "a", 1, 900)  # on busy cores most of a minute goes into starting
    locally(cluster, tmp_path / "b", *cells)
    assert_undisturbed(tmp_path / "a", tmp_path / "b")
    stores = [json.loads(next((tmp_path / x / "_activations").glob("*/manifest.json")).read_text()) for x in "ab"]
    assert stores[0]["shards"] == stores[1]["shards"]
    assert cluster.restarts(harvest) >= 1
    (copy,) = (tmp_path / "node").iterdir()
    assert (copy / "manifest.json").is_file()


def test_nothing_is_lost_and_neighbours_are_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    """A rank killed, an element cancelled, the controller restarted, a node set down; two elements on each node."""
    cells = ("sae=topk", "sae.n_latents=64", "train.seed=0,1,2,3", "train.tokens=3e6", "train.checkpoint_every_s=1")
    how = (*cells, "cluster.pack=1", "cluster.backoff_s=1", "cluster.mem=1500M", "cluster.cpus_per_task=2")
    locally(cluster, tmp_path / "b", *cells)
    submit(cluster, tmp_path / "a", *how)
    job, names = array_id(tmp_path / "a"), json.loads(next((tmp_path / "a").glob("s/_slurm/*/runs.json")).read_text())
    run_dirs = [tmp_path / "a" / "s" / name for (name,) in names]
    for run_dir in run_dirs:
        wait_for_step(run_dir, 200)
    os.kill(cluster.ranks(f"{job}_0")[0], 9)
    cluster.scancel(f"{job}_1")
    cluster.restart_controller()
    assert [attempts(run_dir) for run_dir in run_dirs[2:]] == [1, 1]
    (node,) = {element["NodeList"] for element in cluster.jobs(f"{job}_3")}
    cluster.node_down(node)
    wait_for(lambda: cluster.restarts(job) >= 3, 120, cluster.squeue)
    cluster.node_up(node)
    # the cancelled one, and no other, is submitted again
    assert "1 cells in 1 jobs" in submit(cluster, tmp_path / "a", *how)
    wait_for_results(tmp_path / "a", 4, 400)
    assert_undisturbed(tmp_path / "a", tmp_path / "b")
    assert reasons(run_dirs[0])[0].startswith("the ranks ended with exit code 137")


def test_a_time_limit_shorter_than_a_cell(cluster: Cluster, tmp_path: Path) -> None:
    cells = ("sae=topk", "sae.n_latents=64", "train.tokens=8e6")
    submit(cluster, tmp_path / "a", *cells, 'cluster.time="00:01:00"', "cluster.lead_s=25")
    wait_for_results(tmp_path / "a", 1, 900)  # on busy cores most of a minute goes into starting
    locally(cluster, tmp_path / "b", *cells)
    assert_undisturbed(tmp_path / "a", tmp_path / "b")
    told = reasons(runs_of(tmp_path / "a")[0])
    assert told and set(told) == {"time limit"}


def test_a_site_that_forbids_requeueing(cluster: Cluster, tmp_path: Path) -> None:
    cells = ("sae=topk", "sae.n_latents=64", "train.tokens=1.5e6")
    locally(cluster, tmp_path / "b", *cells)
    submit(cluster, tmp_path / "a", *cells, "cluster.requeue=false")
    wait_for_step(tmp_path / "a" / "s" / runs_of(tmp_path / "b")[0].name, 100)
    cluster.wait(cluster.preempt(), FINISHED, 90)
    wait_for_results(tmp_path / "a", 1)
    assert_undisturbed(tmp_path / "a", tmp_path / "b")
    assert attempts(runs_of(tmp_path / "a")[0]) == 2


def test_a_cell_that_fails_three_times_is_failed_and_the_others_go_on(cluster: Cluster, tmp_path: Path) -> None:
    cells = ("sae=topk", "sae.n_latents=32,64", "train.tokens=40960", "train.checkpoint_every_steps=20")
    locally(cluster, tmp_path / "names", *cells)
    wide = next(path.name for path in runs_of(tmp_path / "names", "topk-n64"))
    (tmp_path / "a" / "s" / wide).mkdir(parents=True)
    (tmp_path / "a" / "s" / wide / "checkpoints").write_text("a file where a directory has to be")
    submit(cluster, tmp_path / "a", *cells, "cluster.pack=1", "cluster.backoff_s=0.2", "cluster.max_running=2")
    results = wait_for_results(tmp_path / "a", 2)
    assert results[wide]["status"] == "failed" and "failed 3 times at step 0" in results[wide]["error"]
    assert "checkpoints" in results[wide]["error"]
    assert sorted(result["status"] for result in results.values()) == ["done", "failed"]
    (row,) = (row for row in sweep_rows(tmp_path / "a" / "s") if row["run_id"] == wide)
    assert (row["status"], row["restarts"]) == ("failed", 2)

    (tmp_path / "a" / "s" / wide / "checkpoints").unlink()
    done = command(cluster, "harness.retry", str(tmp_path / "a" / "s"), "--wait", timeout_s=200)
    assert done.returncode == 0, done.stderr
    assert_undisturbed(tmp_path / "a", tmp_path / "names")


REFUSALS = {
    "partition": (("cluster.partition=nowhere",), "Invalid partition name"),
    "memory": (("cluster.mem=900G",), "Requested node configuration is not available"),
    "account": (("cluster.partition=closed",), "Invalid account"),
    "time": (("cluster.partition=short",), "time limit"),
    "constraint": (("cluster.constraint=unicorn",), "Invalid feature"),
    "nodes": (("mesh.shard=4", "cluster.tasks_per_node=1"), "Node count"),
    "the cells, after their harvest": (
        ("activations=minilm", "cluster.partition=short", "cluster.harvest_time='00:02:00'"),
        "time limit",
    ),
}


def test_what_slurm_refuses_leaves_nothing_submitted(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    cell = ("sae=topk", "sae.n_latents=64", "train.tokens=40960", "ops=reference")
    for name, (overrides, told) in REFUSALS.items():
        assert main([*SYNTHETIC, *cell, *CLUSTER, f"out={tmp_path}", *overrides]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: Slurm refused:") and told in said, name
        cluster.wait_for_empty_queue()  # a harvest may have begun before what follows it was refused
        assert not list((tmp_path / "s" / "_slurm").glob("*/runs.json")), name


def test_no_slurm_here(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "harness.launch",
            *SYNTHETIC,
            f"out={tmp_path}",
            *CLUSTER,
            "sae.n_latents=32",
            "train.tokens=4096",
        ],
        env={**os.environ, "PATH": str(Path(sys.executable).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "run this on a login node of the cluster, or use cluster=local" in done.stderr


def test_two_launches_at_once_double_nothing(cluster: Cluster, tmp_path: Path) -> None:
    grid = ("sae=topk", "sae.n_latents=32,64,128", "train.tokens=40960", "cluster.pack=1", "cluster.flags=[--hold]")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: submit(cluster, tmp_path, *grid), range(2)))
    assert len(cluster.squeue("--array").splitlines()) == 3
    assert "3 have a job already" in submit(cluster, tmp_path, *grid)
    # widening submits the new cell only
    assert "1 cells in 1 jobs" in submit(cluster, tmp_path, *grid, "sae.n_latents=32,64,128,256")
    ended = command(cluster, "harness.cancel", str(tmp_path / "s"))
    assert ended.stdout.count("cancelled (1 runs)") == 4
    assert command(cluster, "harness.cancel", str(tmp_path / "s")).stdout == "nothing queued or running\n"


def test_arrays_are_cut_to_the_size_that_the_site_allows(tmp_path: Path) -> None:
    with running(tmp_path / "slurm", Settings(max_array_size=3)) as small:
        grid = ("sae=topk", "sae.n_latents=32,64,128,256", "sae.k=1,2", "train.tokens=40960", "cluster.pack=1")
        said = submit(small, tmp_path, *grid, "cluster.flags=[--hold]")
        assert said.count(" cells in ") == 3
        assert len(small.squeue("--array").splitlines()) == 8


def test_the_ranks_of_an_srun_step_train_the_grid_together(cluster: Cluster, tmp_path: Path) -> None:
    cells = (*SYNTHETIC, "sae=topk", "sae.n_latents=32,64", "train.tokens=40960")
    step = ("srun", "--ntasks=2", "--nodes=2", "--mem=2000M", sys.executable, "-m", "harness.launch", *cells)
    os_names = {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*step, f"out={tmp_path}/a", "mesh.shard=2"],
        env=cluster.env() | os_names,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 cells done" in done.stderr
    assert len(list((tmp_path / "a" / "s").glob("*/attempts/*"))) == 2
    wrong = subprocess.run(
        [*step, f"out={tmp_path}/b"], env=cluster.env() | os_names, capture_output=True, text=True, timeout=180
    )
    assert wrong.returncode == 2
    assert "srun started 2 ranks, but mesh.dp=1 × mesh.shard=1 + mesh.lm=0 needs 1" in wrong.stderr


def test_a_full_disk_when_submitting(cluster: Cluster, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(b"\0" * 48 * 1024)
    said = submit(cluster, small_disk, "sae=topk", "sae.n_latents=32", "train.tokens=40960", expect=2)
    assert "No space left on device" in said and cluster.squeue() == ""
