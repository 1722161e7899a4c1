"""`result.json`: how a run ended. It is built and written here and nowhere else, after everything else of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import to_container
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.record import names
from harness.record.notes import read_notes
from harness.record.provenance import now
from harness.record.run import Run
from harness.record.rundir import attempts

FINAL = ("done", "diverged")
"""Statuses that are results. `failed` is not: a later launch tries again."""


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """The runs that had no result when they were planned; a failed one counts, it is tried again."""
    return [run for run in runs if run.status not in FINAL]


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None when the run has not ended. Raises `UserError` when it is not JSON."""
    path = run_dir / names.RESULT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to run this cell again") from error


def write_result(run: Run, outcome: Mapping[str, Any], started: str) -> dict[str, Any]:
    """End a run: what identifies it, `outcome` (`status` and what was measured), and when. Returns what was written.

    `started` is when this attempt began, ISO 8601.
    """
    config, sae = run.config, run.config.sae
    result = {
        "run_id": run.run_id,
        "sae": sae.architecture,
        "n_latents": sae.n_latents,
        "k": sae.k,
        "n_experts": sae.n_experts,
        "seed": config.train.seed,
        **outcome,
        "attempts": max(1, attempts(run.run_dir)),
        "notes": read_notes(run.run_dir),
        "started": started,
        "finished": now(),
        "config": to_container(config),
    }
    write_json_atomic(run.run_dir / names.RESULT, result)
    return result


def write_failure(run: Run, error: BaseException, started: str) -> None:
    """End a run that raised: status `failed`, and the error in one line."""
    write_result(run, {"status": "failed", "error": describe(error)}, started)


def describe(error: BaseException) -> str:
    """An exception as one line; the log has all of it."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else f"{text[:300]} …"
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind


def set_failure_aside(run_dir: Path) -> None:
    """Move the `result.json` of a failed run to the attempt that wrote it, so that the run counts as unfinished."""
    aside = run_dir / names.ATTEMPTS / str(max(attempts(run_dir), 1))
    (run_dir / names.RESULT).replace(aside / names.RESULT)
