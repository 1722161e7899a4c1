"""Under which id a tracker knows a run directory."""

from __future__ import annotations

import secrets
from pathlib import Path

from harness.files import write_json_atomic
from harness.record import names
from harness.schema import TEXT, dict_of, read_json


def copy_id(run_dir: Path, tracker: str) -> str:
    """The id under which a tracker knows this directory, from `tracker.json`; made at the first call.

    It is more than the run's name: the same run may be trained twice (in another sweep, or after it was deleted), and
    W&B never accepts the id of a deleted run again.
    """
    path, key = run_dir / names.TRACKER, f"{tracker}_id"
    try:
        ids = read_json(path, dict_of(TEXT), "remove it; the tracker then gets a new copy")
    except FileNotFoundError:
        ids = {}
    if key not in ids:
        ids[key] = f"{run_dir.name}-{secrets.token_hex(3)}"
        write_json_atomic(path, ids)
    return ids[key]
