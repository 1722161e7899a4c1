"""Launches on a real Slurm that do more than submit cells: a calibration in a job, one harvest for many hooks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dev.slurm.cluster import Cluster
from tests.activations.conftest import models_on_disk, text_files
from tests.slurm.runs import command
from tests.slurm.sweeps import CLUSTER, SYNTHETIC

__all__ = ["models_on_disk", "text_files"]

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

CELL = ("sae=topk", "sae.n_latents=32", "train.tokens=10240")


def test_steps_are_timed_in_a_job(cluster: Cluster, tmp_path: Path) -> None:
    asked = (*SYNTHETIC, f"out={tmp_path}", *CLUSTER, *CELL, "--calibrate")
    setup = f"cluster.setup=['env > {tmp_path}/environment']"
    done = command(cluster, "harness.launch", *asked, setup, timeout_s=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "SLURM_JOB_NAME=calibrate" in (tmp_path / "environment").read_text()
    (calibration,) = json.loads((tmp_path / "s" / "plan.json").read_text())["calibrations"]
    assert calibration["steps"] and not list(tmp_path.glob("s/*/result.json"))
    refused = command(cluster, "harness.launch", *asked, "cluster.partition=nowhere", timeout_s=300)
    assert refused.returncode == 1 and "partition" in refused.stderr


@pytest.fixture
def words(models_on_disk: dict[str, Path], text_files: Path) -> list[str]:
    """A cell on the activations of a small language model."""
    own = [word for word in SYNTHETIC if not word.startswith(("activations=", "activations.synthetic"))]
    lm = ["activations=lm", f"activations.model={models_on_disk['llama']}", "activations.context=16"]
    return [*own, *lm, "activations.text=files", f"activations.text_paths=[{text_files}/*.txt]", *CELL]


def test_one_job_harvests_for_many_hooks(cluster: Cluster, words: list[str], tmp_path: Path) -> None:
    asked = (*words, "activations.tokens=3000", "activations.layer=0,1,2", f"out={tmp_path}", *CLUSTER, "--wait")
    done = command(cluster, "harness.launch", *asked, timeout_s=500)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr.count("harvests the activations first") == 1
    assert len(list((tmp_path / "_activations").glob("*/manifest.json"))) == 3
    results = [json.loads(path.read_text()) for path in tmp_path.glob("s/*/result.json")]
    assert sorted(result["config"]["activations"]["layer"] for result in results) == [0, 1, 2]
    assert all(result["status"] == "done" for result in results)


def test_a_rank_of_a_job_computes_its_windows(cluster: Cluster, words: list[str], tmp_path: Path) -> None:
    windows = ("activations.keep=window", "activations.tokens=8000", "activations.window_tokens=2000")
    for out, place in {"here": (), "job": (*CLUSTER, "mesh.lm=1", "--wait")}.items():
        done = command(cluster, "harness.launch", *words, *windows, f"out={tmp_path / out}", *place, timeout_s=500)
        assert done.returncode == 0, done.stderr + done.stdout
    assert "--ntasks=2" in next((tmp_path / "job").glob("s/_slurm/*cells*/job.sh")).read_text()
    here, job = (next((tmp_path / out).glob("s/*/sae/sae.safetensors")) for out in ("here", "job"))
    assert job.parents[1].name == here.parents[1].name and job.read_bytes() == here.read_bytes()
