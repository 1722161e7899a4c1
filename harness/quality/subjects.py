"""From a target of the command line to SAEs: runs and sweeps of ours, and SAEs that other tools have written."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import sha256_of, user_path
from harness.quality.metric import Subject
from harness.quality.shared import Rows
from harness.record import names
from harness.record.result import read_result
from harness.record.rundir import read_config
from harness.record.sweepdir import require_sweep
from harness.saes.foreign import KINDS, load_foreign
from harness.saes.trained import TrainedSae, load

_FIT_ROWS = 4096


def is_foreign(target: str) -> bool:
    """Whether this is `KIND:PATH`. Raises `UserError` for an unknown kind, unless there is such a directory."""
    kind, colon, _ = target.partition(":")
    if colon and kind not in KINDS and not Path(user_path(target)).exists():
        raise UserError(f"{target}: '{kind}' is not a kind of SAE; choose from {', '.join(KINDS)}, or give a directory")
    return kind in KINDS


def foreign_subject(target: str, activations: ActivationsConfig, out: Path) -> Subject:
    """The SAE of `KIND:PATH`, judged on `activations`; results go to a folder of `out` that is named after it and its
    weights: the last part of the path is often the same, such as `trainer_0`.

    Raises `UserError` as `load_foreign` does.
    """
    sae = load_foreign(target)
    kind, _, place = target.partition(":")
    digest = hashlib.sha256()
    for key, tensor in sorted(sae.params.items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    name = f"{kind}-{Path(place).stem}-{digest.hexdigest()[:10]}"
    size = sum(tensor.numel() * tensor.element_size() for tensor in sae.params.values())
    return Subject(name, out / name, digest.hexdigest(), activations, out, size, lambda: sae, foreign=True)


def require_fit(sae: TrainedSae, name: str, rows: Rows) -> None:
    """Raises `UserError` when an SAE cannot belong to these activations: another width, or worse than the mean."""
    if sae.sae.d_model != rows.x.shape[1]:
        raise UserError(
            f"{name} is for rows of {sae.sae.d_model} dimensions, these activations have {rows.x.shape[1]}: "
            "choose its own model and hook with activations=…"
        )
    x = rows.x[:_FIT_ROWS]
    fvu = float((x - sae.forward(x).cpu()).square().sum() / (x - rows.mean).square().sum())
    if not fvu < 1:
        told = ", ".join(str(value) for key, value in sae.origin.activations.items() if key != "kind" and value)
        raise UserError(
            f"{name} does not fit these activations: its fvu is {fvu:.3g}, predicting the mean has 1. Another layer, "
            f"hook, normalisation or BOS policy? Its files say: {told or 'nothing'}"
        )


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
