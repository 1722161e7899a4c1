"""`--rehearse` on a real Slurm: one job per mesh, one table, nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest

from dev.slurm.cluster import Cluster
from tests.slurm.runs import command
from tests.slurm.sweeps import CLUSTER, SYNTHETIC

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_every_shape_is_tried_in_one_job_per_mesh(cluster: Cluster, tmp_path: Path) -> None:
    cells = ("sae=topk", "sae.n_latents=32,64", "train.tokens=1e6", "mesh.dp=2", "cluster.tasks_per_node=1")
    done = command(
        cluster,
        "harness.launch",
        *SYNTHETIC,
        f"out={tmp_path}",
        *CLUSTER,
        *cells,
        "cluster.pack=1",
        "--rehearse",
        timeout_s=500,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.count("done") == 2 and done.stdout.count("2 × 1") == 2
    assert "rehearses 2 shapes" in done.stderr, "in one job"
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_environment_shows_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    wrong = ("sae=topk", "sae.n_latents=32", "train.tokens=1e6", "cluster.python=/nowhere/python")
    done = command(
        cluster, "harness.launch", *SYNTHETIC, f"out={tmp_path}", *CLUSTER, *wrong, "--rehearse", timeout_s=300
    )
    assert done.returncode == 1, done.stderr + done.stdout
    assert "failed: exit code 127" in done.stdout and "/nowhere/python" in done.stdout
    assert list(tmp_path.iterdir()) == []
