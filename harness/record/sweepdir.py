"""The directory of a sweep, `<out>/<sweep>/`: what was asked for (`study.json`) and what was expected (`plan.json`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import write_json_atomic
from harness.record import names
from harness.schema import FILE_NAME, FLAG, OBJECT, TEXT, dict_of, fields, list_of, number, optional, read_json, whole

_AGAIN = "remove it and launch the sweep again"

_STUDY = fields(
    {
        "runs?": list_of(FILE_NAME),
        **{f"{name}?": TEXT for name in ("name", "question", "title", "study", "command", "time")},
        "overrides?": list_of(TEXT),
    }
)

_EXPECTED = ("seconds", "train_s", "tokens", "memory_bytes")
_PLAN = fields(
    {
        "calibrations": list_of(OBJECT),
        "runs": dict_of(fields({f"{name}?": optional(number(0)) for name in _EXPECTED}), FILE_NAME),
    }
)


_BAND = fields({"value": number(), "lo": optional(number()), "hi": optional(number())})
_PLANNED_RUN = fields(
    {"n": whole(1), "k": whole(1), "seed": whole(), "run": FILE_NAME, "predicted": _BAND, "came": optional(number())}
)
_ROUND = fields(
    {"time": TEXT, "goal": TEXT, "spent": number(0), "forecast": _BAND, "expected": number(0)}
    | {"runs": list_of(_PLANNED_RUN), "ended": FLAG}
)
_END = fields({"verdict": TEXT, "reason": TEXT, "spent": number(0), "forecast": optional(_BAND)})
_ROUNDS = fields({"goal": TEXT, "budget": number(0), "rounds": list_of(_ROUND), "end": optional(_END)})


def require_sweep(sweep_dir: Path) -> None:
    """Raises `UserError` unless the directory exists."""
    if not sweep_dir.is_dir():
        raise UserError(
            f"there is no sweep at {sweep_dir}; the sweeps are the directories of an output directory, by default runs/"
        )


def read_study(sweep_dir: Path) -> dict[str, Any] | None:
    """What the sweep was asked for: `name`, `question`, `title`, `law`, `study`, `overrides`, `command`, `time`, and
    `runs`, a list of run_ids. None when the directory has no `study.json`. Raises `UserError` when it is damaged."""
    path = sweep_dir / names.STUDY
    try:
        return {"runs": [], **read_json(path, _STUDY, _AGAIN)}
    except FileNotFoundError:
        return None


def write_study(sweep_dir: Path, content: dict[str, Any]) -> None:
    """Write `study.json`, with the keys that `read_study` returns."""
    write_json_atomic(sweep_dir / names.STUDY, content)


def read_plan(sweep_dir: Path) -> dict[str, Any]:
    """`{"calibrations": [...], "runs": {run_id: {...}}}`; both empty without a plan. Raises `UserError` when it is
    damaged.

    A run has `seconds` (start included), `train_s` (what the record calls `wall_s`, of its share in a pack), `tokens`,
    `flops` by part, `memory_bytes` of a rank that trains it alone (mapped rows of the store included, as the system
    counts them), `calibration`, the number of the calibration that the times come from, and `settings`
    (`config.science`). Plans of earlier versions have no settings.
    """
    path = sweep_dir / names.PLAN
    try:
        content = read_json(path, _PLAN, _AGAIN)
    except FileNotFoundError:
        return {"calibrations": [], "runs": {}}
    return {"calibrations": content["calibrations"], "runs": content["runs"]}


def write_plan(sweep_dir: Path, content: dict[str, Any]) -> None:
    """Write `plan.json`, with the keys that `read_plan` returns."""
    write_json_atomic(sweep_dir / names.PLAN, content)


def read_rounds(sweep_dir: Path) -> dict[str, Any]:
    """What a sweep that chases a forecast did: `goal`, `budget` (FLOPs), `rounds` and `end`, None while it goes on.

    A round has `time`, `goal`, `spent` (FLOPs before it), `forecast` (`value`, `lo`, `hi` of the law at the goal before
    it), `expected` (half the width of ln(forecast) that is predicted after it), `ended` and `runs`. A run has
    `n`, `k`, `seed`, `run` (its run_id), `predicted` (the interval of one new run) and `came` (its loss, None without
    one). `end` has `verdict`, `reason`, `spent`, `forecast`. Raises `UserError` when the file is damaged.
    """
    try:
        return read_json(sweep_dir / names.ROUNDS, _ROUNDS, "remove it; the rounds then begin with the runs that exist")
    except FileNotFoundError:
        return {"goal": "", "budget": 0.0, "rounds": [], "end": None}


def write_rounds(sweep_dir: Path, content: dict[str, Any]) -> None:
    """Write `rounds.json`, with the keys that `read_rounds` returns."""
    write_json_atomic(sweep_dir / names.ROUNDS, content)
