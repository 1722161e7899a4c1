"""The directory of a sweep, `<out>/<sweep>/`: what was asked for (`study.json`) and what was expected (`plan.json`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import write_json_atomic
from harness.record import names


def require_sweep(sweep_dir: Path) -> None:
    """Raises `UserError` unless the directory exists."""
    if not sweep_dir.is_dir():
        raise UserError(f"there is no sweep at {sweep_dir}; the sweeps are the directories in runs/ (or out=DIR)")


def read_study(sweep_dir: Path) -> dict[str, Any] | None:
    """What the sweep was asked for: `name`, `question`, `title`, `law`, `study`, `overrides`, `command`, `time`, and
    `runs`, a list of run_ids. None when the directory has no `study.json`. Raises `UserError` when it is damaged."""
    path = sweep_dir / names.STUDY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {**content, "runs": list(content.get("runs", []))}
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and launch the sweep again") from error


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
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"calibrations": list(content["calibrations"]), "runs": dict(content["runs"])}
    except FileNotFoundError:
        return {"calibrations": [], "runs": {}}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and launch the sweep again") from error


def write_plan(sweep_dir: Path, content: dict[str, Any]) -> None:
    """Write `plan.json`, with the keys that `read_plan` returns."""
    write_json_atomic(sweep_dir / names.PLAN, content)
