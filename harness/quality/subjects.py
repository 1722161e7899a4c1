"""From a target of the command line to SAEs: runs and sweeps of ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from harness.errors import UserError
from harness.files import sha256_of
from harness.quality.metric import Subject
from harness.record import names
from harness.record.result import read_result
from harness.record.rundir import read_config
from harness.record.sweepdir import require_sweep
from harness.saes.trained import load


def subjects_of(target: Path) -> tuple[list[Subject], list[str]]:
    """The finished runs of a run directory or a sweep directory, and a note per run that is left out.

    Raises `UserError` when the target is neither, or holds no finished run.
    """
    require_sweep(target)
    single = (target / names.CONFIG).is_file()
    candidates = [target] if single else sorted(path for path in target.iterdir() if (path / names.CONFIG).is_file())
    found, notes = [], []
    for run_dir in candidates:
        result = read_result(run_dir)
        if result is None or result.get("status") != "done":
            status = "not finished" if result is None else result.get("status")
            notes.append(f"{run_dir.name} is left out: it is {status}")
            continue
        found.append(_subject(run_dir.resolve()))
    if not found:
        raise UserError(f"{target} holds no finished run; train it first (python -m harness.status {target})")
    return found, notes


def _subject(run_dir: Path) -> Subject:
    weights = run_dir / names.SAE / names.WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} is missing; copy the run directory again, or train the run again")
    return Subject(
        name=run_dir.name,
        directory=run_dir,
        weights=sha256_of(weights),
        activations=read_config(run_dir).activations,
        out=run_dir.parents[1],
        weight_bytes=weights.stat().st_size,
        load=partial(load, run_dir),
    )
