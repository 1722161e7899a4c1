"""A sweep that chases a forecast on a real Slurm: jobs decide and go on, and no process waits."""

from __future__ import annotations

from pathlib import Path

import pytest

from dev.slurm.cluster import Cluster, wait_for
from harness.record.sweepdir import read_rounds, write_rounds
from tests.slurm.runs import command
from tests.slurm.sweeps import CLUSTER, SYNTHETIC

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def test_jobs_decide_and_go_on(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "quick"
    sweep.mkdir()
    band = {"value": 0.5, "lo": 0.1, "hi": 0.9}
    run = {"n": 128, "k": 2, "seed": 0, "run": "unnamed", "predicted": band, "came": None}
    started = {"time": "", "goal": "", "spent": 0.0, "forecast": band, "expected": 0.1, "runs": [run], "ended": False}
    write_rounds(sweep, {"goal": "", "budget": 1e15, "rounds": [started], "end": None})
    settings = [text for text in SYNTHETIC if text.split("=")[0] not in ("activations", "sae.k", "sweep")]
    arguments = [
        "--activations",
        "synthetic",
        "--arch",
        "topk",
        "--width",
        "16,32",
        "--k",
        "1,2",
        "--out",
        str(tmp_path),
    ]
    arguments += [
        "--until",
        "forecast n=64 k=2 within 3%",
        "--budget",
        "1e15",
        *settings,
        "train.tokens=4096",
        *CLUSTER,
    ]

    done = command(cluster, "sweeps", *arguments)
    assert done.returncode == 0 and "decides what comes next" in done.stderr, done.stderr
    again = command(cluster, "sweeps", *arguments)
    assert again.returncode == 0, again.stderr
    assert len(list((sweep / "_slurm").glob("*-decision-*"))) == 1, "one decision waits at a time"

    def logs() -> str:
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sweep.glob("_slurm/*/log/*"))

    record = wait_for(lambda: (found := read_rounds(sweep))["end"] and found, 240.0, logs)
    assert record["end"]["verdict"] == "unsupported", "two widths make no law"
    (ended,) = record["rounds"]
    assert ended["ended"] and 0 < ended["runs"][0]["came"] < 1
