"""What became of a run, from its files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.jobs.rundir import FINAL, read_result
from harness.record import metrics
from harness.record.claim import holder

STATES = ("pending", "running", "interrupted", "done", "diverged", "failed")


@dataclass(frozen=True)
class RunState:
    run_id: str
    status: str
    """One of `STATES`."""
    result: dict[str, Any] | None
    host: str | None = None
    """Machine of the process that works on it now."""

    @property
    def final(self) -> bool:
        return self.status in FINAL


def claim_path(run_dir: Path) -> Path:
    """The lock of whoever works on the run."""
    return run_dir / "claim.json"


def state_of(run_dir: Path) -> RunState:
    """Raises `UserError` when `result.json` is damaged."""
    if not run_dir.is_dir():
        return RunState(run_dir.name, "pending", None)
    result = read_result(run_dir)
    owner = holder(claim_path(run_dir))
    if owner is not None:
        return RunState(run_dir.name, "running", None, owner.host)
    if result is not None:
        return RunState(run_dir.name, str(result.get("status", "failed")), result)
    started = (run_dir / "attempts").is_dir()
    return RunState(run_dir.name, "interrupted" if started else "pending", None)


def newest_metrics(run_dir: Path) -> dict[str, Any]:
    return metrics.last(run_dir / "metrics.jsonl")
