"""Small sweeps for a scratch cluster: how to ask for them, and the same runs made by one process without Slurm."""

from __future__ import annotations

import json
from pathlib import Path

from dev.slurm.cluster import Cluster, wait_for
from harness.record.result import read_result
from tests.slurm.runs import command

SYNTHETIC = (
    *("activations=synthetic", "activations.synthetic.d_model=16", "activations.synthetic.n_features=32"),
    *("activations.heldout_tokens=512", "train.batch_tokens=256", "train.eval_points=2", "train.eval_rows=256"),
    *("train.log_every_steps=20", "train.threads=1", "train.precision=fp32", "tracker=none", "sae.k=2", "sweep=s"),
)
"""Cells of a millisecond a step."""

CLUSTER = (
    *("cluster=slurm", "cluster.gpus_per_task=0", "cluster.cpus_per_task=1", "cluster.mem=2000M"),
    *("cluster.network_interface=lo", "cluster.time=00:20:00"),
)

GRID = ("sae=topk,switch", "sae.n_latents=32,64", "sae.n_experts=1,2")


def submit(cluster: Cluster, out: Path, *overrides: str, expect: int = 0) -> str:
    """Submit a sweep, return what the command said."""
    done = command(cluster, "harness.launch", *SYNTHETIC, f"out={out}", *CLUSTER, *overrides)
    assert done.returncode == expect, done.stderr + done.stdout
    return done.stderr


def locally(cluster: Cluster, out: Path, *overrides: str) -> None:
    """The same sweep in one process."""
    done = command(cluster, "harness.launch", *SYNTHETIC, f"out={out}", *overrides, timeout_s=600)
    assert done.returncode == 0, done.stderr


def runs_of(out: Path, kind: str = "") -> list[Path]:
    """Run directories of the sweep, of one kind of SAE if given."""
    return sorted(path.parent for path in (out / "s").glob(f"{kind}*/config.yaml"))


def wait_for_results(out: Path, count: int, timeout_s: float = 240.0) -> dict[str, dict]:
    """Results by run_id, once there are so many."""

    def found() -> dict[str, dict]:
        results = {path.parent.name: read_result(path.parent) or {} for path in (out / "s").glob("*/result.json")}
        return results if len(results) >= count else {}

    def logs() -> str:
        texts = [f"{p}:\n{p.read_text()[-3000:]}" for p in (out / "s").glob("_slurm/*/log/*")]
        return "\n".join(["no results in time", *texts])

    return wait_for(found, timeout_s, logs)


def array_id(out: Path, what: str = "cells") -> str:
    """Slurm's id of the newest array of the sweep."""
    newest = max((out / "s" / "_slurm").glob(f"*-{what}-*/submitted.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())["job_id"]
