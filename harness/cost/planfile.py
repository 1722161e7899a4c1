"""`plan.json` of a sweep: what was expected of every run when it was launched, to be set beside what happened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.cost.estimate import Estimates
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.record.rundir import FINAL
from harness.sweep.runs import Run

NAME = "plan.json"


def read_plan(sweep_dir: Path) -> dict[str, Any]:
    """`{"calibrations": […], "runs": {run_id: {…}}}`; without runs when there is no plan. Raises `UserError`."""
    path = sweep_dir / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"calibrations": list(content["calibrations"]), "runs": dict(content["runs"])}
    except FileNotFoundError:
        return {"calibrations": [], "runs": {}}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it, launching the sweep again writes a new one"
        ) from error


def record_plan(sweep_dir: Path, runs: Sequence[Run], estimates: Estimates) -> None:
    """Write what is expected of the runs of one sweep that are still to be trained; what an earlier launch expected of
    others stays. Nothing is written when there is nothing to train. Raises `UserError` when the file is damaged."""
    to_do = [run for run in runs if run.status not in FINAL]
    if not to_do:
        return
    plan = read_plan(sweep_dir)
    plan["runs"] |= {run.run_id: _expected(run, estimates, len(plan["calibrations"])) for run in to_do}
    plan["calibrations"].append(estimates.calibration.facts())
    write_json_atomic(sweep_dir / NAME, plan)


def _expected(run: Run, estimates: Estimates, calibration: int) -> dict[str, Any]:
    """Keys: seconds (start included), train_s (what the record calls wall_s, of this run's share in a pack), tokens,
    flops by part, memory_bytes of a rank that trains it alone (mapped rows of the store included, as the system counts
    them), and the number of the calibration."""
    known = estimates.of(run)
    return {
        "seconds": known.seconds,
        "train_s": known.train_s,
        "tokens": known.tokens,
        "flops": known.flops,
        "memory_bytes": None if known.memory_bytes is None else known.memory_bytes + known.mapped_bytes,
        "calibration": calibration,
    }
