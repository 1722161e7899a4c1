"""`result.json`: how a run ended. It is built and written here and nowhere else, after everything else of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.config import to_container
from harness.files import write_json_atomic
from harness.record import names
from harness.record.notes import read_notes
from harness.record.provenance import now
from harness.record.run import Run
from harness.record.rundir import attempts, require_own
from harness.schema import (
    FILE_NAME,
    FLAG,
    OBJECT,
    SEAL,
    SHA256,
    TEXT,
    dict_of,
    fields,
    list_of,
    number,
    one_of,
    optional,
    read_json,
    sealed,
    text,
    whole,
    with_seal,
)

FINAL = ("done", "diverged")
"""Statuses that are results. `failed` is not: a later launch tries again."""


_NUMBERS = {
    **dict.fromkeys(("n_latents", "n_experts", "d_model", "attempts", "trained_together"), whole(1)),
    **dict.fromkeys(("k", "seed", "steps", "diverged_at_step", "peak_memory_bytes"), whole()),
    **dict.fromkeys(("tokens", "unique_tokens", "flops", "flops_core", "params", "wall_s", "tokens_per_s"), number(0)),
    **dict.fromkeys(("fvu", "fvu_se", "mse", "l0", "dead_frac", "fvu_raw", "gain_se"), number(0)),
    "gain": number(),
}

_OTHERS = {
    "run_id": TEXT,
    "sae": TEXT,
    "config": OBJECT,
    "error": TEXT,
    "store_id": TEXT,
    "converged": FLAG,
    "pca_fvu": dict_of(optional(number()), text(r"\d+(\.\d+)?", "a number of latents")),
    "started": TEXT,
    "finished": TEXT,
}

_RESULT = sealed(
    fields(
        {
            "status": one_of("done", "diverged", "failed"),
            "weights?": dict_of(SHA256, FILE_NAME),
            "notes?": list_of(TEXT),
        }
        # null stands for a number that is not finite or unknown
        | {f"{name}?": optional(check) for name, check in (_NUMBERS | _OTHERS).items()}
    )
)


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """The runs that had no result when they were planned; a failed one counts, it is tried again."""
    return [run for run in runs if run.status not in FINAL]


def read_result(run_dir: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None when the run has not ended. Raises `UserError` when it is damaged, was
    edited or belongs to another run."""
    path = run_dir / names.RESULT
    try:
        result = read_json(path, _RESULT, "remove it to run this cell again")
    except FileNotFoundError:
        return None
    require_own(path, run_dir, result.get("run_id", run_dir.name))
    result.pop(SEAL, None)
    return result


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
    write_json_atomic(run.run_dir / names.RESULT, with_seal(result))
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
    aside.mkdir(parents=True, exist_ok=True)
    (run_dir / names.RESULT).replace(aside / names.RESULT)
