"""Evaluations on a real Slurm: an array that is submitted once, and that goes on where it was stopped."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dev.slurm.cluster import Cluster, wait_for
from harness.places.slurm.task import evaluated
from harness.record.quality import read_qualities
from tests.slurm.runs import command
from tests.slurm.sweeps import CLUSTER, locally, runs_of

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_an_array_evaluates_each_run_once(cluster: Cluster, tmp_path: Path) -> None:
    locally(cluster, tmp_path, "sae=topk", "sae.n_latents=32,64", "train.tokens=20480")
    runs = runs_of(tmp_path)

    def asked(metrics: str) -> str:
        words = (str(tmp_path / "s"), "--metrics", metrics, "--tokens", "500", *CLUSTER)
        done = command(cluster, "harness.evaluate", *words)
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "0 of 2 runs are evaluated" in asked("geometry,mdl")
    # submitted again while it is queued or running: nothing more, or only what is still missing
    assert "job " not in asked("geometry,mdl").replace("have a job already", "")

    def found() -> bool:
        return all(set(read_qualities(run)) == {"geometry", "mdl"} for run in runs)

    def logs() -> str:
        texts = [f"{p}:\n{p.read_text()[-2000:]}" for p in (tmp_path / "s" / "_slurm").glob("*/log/*")]
        return "\n".join(["not evaluated in time", *texts])

    wait_for(found, 240.0, logs)
    before = {run: (run / "quality" / "mdl.json").stat().st_mtime_ns for run in runs}
    assert "2 of 2 runs are evaluated" in asked("geometry,mdl")
    time.sleep(1)
    assert before == {run: (run / "quality" / "mdl.json").stat().st_mtime_ns for run in runs}
    assert len(list((tmp_path / "s" / "_slurm").glob("s-evaluate-*/job.sh"))) == 1

    asked("progressive")
    assert command(cluster, "harness.cancel", str(tmp_path / "s")).stdout.count("cancelled") == 2


def test_only_a_stopped_element_is_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requeued: list[int] = []
    monkeypatch.setattr("harness.places.slurm.task.again", lambda _directory, index: requeued.append(index))
    monkeypatch.setattr("harness.places.slurm.task.own_state", lambda: "RUNNING")
    assert [evaluated(tmp_path, 3, code) for code in (0, 1, 2, 75)] == [0, 1, 2, 0] and requeued == [3]
    monkeypatch.setattr("harness.places.slurm.task.own_state", lambda: "CANCELLED")
    assert evaluated(tmp_path, 4, 75) == 0 and requeued == [3]
