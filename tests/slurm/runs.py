"""The project's commands against a scratch cluster, and what their runs have come to."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

from dev.slurm.cluster import Cluster, wait_for
from harness.record import metrics


def command(
    cluster: Cluster, module: str, *arguments: str, timeout_s: float = 120.0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` as a user of the cluster does on its login node; the exit code is not judged."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=cluster.env() | {"OMP_NUM_THREADS": "1"} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 120.0) -> None:
    """Return when a run has recorded step `step` or a later one."""
    path = run_dir / "metrics.jsonl"
    wait_for(
        lambda: metrics.last(path).get("step", 0) >= step, timeout_s, lambda: f"{path} has not come to step {step}"
    )


def repeated_steps(run_dir: Path) -> list[int]:
    """Steps that a run's record has more than once (training and evaluation lines counted apart)."""
    lines = Counter((line["step"], "fvu" in line) for line in metrics.read(run_dir / "metrics.jsonl"))
    return sorted({step for (step, _), count in lines.items() if count > 1})
