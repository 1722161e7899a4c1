"""What a sweep is meant to do, written into its directory before anything trains: `study.json` and `plan.json`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import science
from harness.cost.estimate import Estimates
from harness.cost.repeats import repeats
from harness.errors import UserError
from harness.record.provenance import command_line, now
from harness.record.result import unfinished
from harness.record.run import Run
from harness.record.sweepdir import read_plan, read_study, write_plan, write_study
from harness.sweep.runs import sweep_dirs_of


def record_intent(about: Mapping[str, Any], runs: Sequence[Run], estimates: Estimates) -> None:
    """Write into the directory of every sweep what was asked for and what it is expected to take.

    `about` describes the request (`Request.about`); it is empty for runs that the sweep knows. Raises `UserError` when
    a directory cannot be written or its files are damaged.
    """
    for sweep_dir in sweep_dirs_of(runs):
        make_writable(sweep_dir)
        own = [run for run in runs if run.sweep_dir == sweep_dir]
        _record_study(sweep_dir, about, own)
        _record_plan(sweep_dir, own, estimates)


def make_writable(directory: Path) -> None:
    """Make the directory if it is missing, and try to write into it. Raises `UserError` if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}; choose another out=DIR") from error


def _record_study(sweep_dir: Path, about: Mapping[str, Any], runs: Sequence[Run]) -> None:
    """The request, and every run that was ever asked for in this directory."""
    earlier = read_study(sweep_dir) or {"runs": []}
    unnamed = {"name": sweep_dir.name, "question": "", "title": sweep_dir.name, "law": "sae_nk"}
    unnamed |= {"study": "", "overrides": []}
    described = {key: earlier.get(key, value) for key, value in unnamed.items()} | dict(about)
    run_ids = list(dict.fromkeys([*earlier["runs"], *(run.run_id for run in runs)]))
    write_study(sweep_dir, {**described, "command": command_line(), "time": now(), "runs": run_ids})


def _record_plan(sweep_dir: Path, runs: Sequence[Run], estimates: Estimates) -> None:
    """What the unfinished runs are expected to take; what an earlier launch expected of others stays."""
    to_do = unfinished(runs)
    if not to_do:
        return
    plan = read_plan(sweep_dir)
    plan["runs"] |= {run.run_id: _expected(run, estimates, len(plan["calibrations"])) for run in to_do}
    plan["calibrations"].append(estimates.calibration.facts())
    write_plan(sweep_dir, plan)


def _expected(run: Run, estimates: Estimates, calibration: int) -> dict[str, Any]:
    """The entry of a run in `plan.json`, see `sweepdir.read_plan`."""
    estimate = estimates.of(run)
    memory = estimate.memory_bytes
    return {
        "seconds": estimate.seconds,
        "train_s": estimate.train_s,
        "tokens": estimate.tokens,
        "flops": estimate.flops,
        "repeats": repeats(run),
        "memory_bytes": None if memory is None else memory + estimate.mapped_bytes,
        "calibration": calibration,
        "settings": science(run.config),
    }
