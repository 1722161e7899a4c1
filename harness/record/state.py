"""The state of a run, read from its files alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.process.claim import holder
from harness.record import names
from harness.record.attempt import read_ended
from harness.record.result import read_result
from harness.record.rundir import attempts, claim_path

STATES = ("failed", "diverged", "running", "preempted", "interrupted", "pending", "done")
"""The most urgent first. A `preempted` run starts again by itself, an `interrupted` one only when launched again."""


@dataclass(frozen=True)
class RunState:
    run_id: str
    status: str
    """One of `STATES`."""
    result: dict[str, Any] | None
    host: str | None = None
    """Machine of the process that trains it now."""
    ended: dict[str, Any] | None = None
    """How the newest attempt ended, see `attempt.read_ended`; None if it left no record."""


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
    number = attempts(run_dir)
    if not number:
        return RunState(run_dir.name, "pending", None)
    ended = read_ended(run_dir / names.ATTEMPTS / str(number))
    again = ended is not None and bool(ended.get("requeued"))
    return RunState(run_dir.name, "preempted" if again else "interrupted", None, ended=ended)
