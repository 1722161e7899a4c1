"""Runs of a W&B group: one row per summary, and functions that fetch the complete (unsampled) histories."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pandas as pd

from harness.errors import UserError


def read_group(path: str, api: Any = None) -> tuple[pd.DataFrame, list[Any], dict[str, Callable[[], pd.DataFrame]]]:
    """Rows, configurations and histories of the runs in `entity/project/group`, or of all in `entity/project`.

    Args:
        api: `wandb.Api()` by default.

    Returns (frame, configs, histories): one row per run with the keys of its summary; a history is fetched when it is
    called, by `scan_history`, which returns every logged line (`history` would sample them). Raises `UserError` if the
    path is wrong, cannot be read, or holds no run.
    """
    parts = path.strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"wandb:{path} is not wandb:entity/project/group")
    filters = {"group": parts[2]} if len(parts) == 3 else {}
    try:
        api = _api() if api is None else api
        runs = list(api.runs("/".join(parts[:2]), filters=filters))
    except Exception as problem:  # wandb raises its own errors, those of requests, and ValueErrors
        text = (str(problem) or type(problem).__name__).splitlines()[0]
        raise UserError(f"wandb:{path} cannot be read: {text}; check its name, the network and WANDB_API_KEY") from None
    if not runs:
        raise UserError(f"wandb:{path} holds no run")
    rows, configs, histories = [], [], {}
    for run in runs:
        config = _plain(run.config)
        summary = {key: value for key, value in _plain(run.summary).items() if not key.startswith("_")}
        name = str(summary.get("run_id") or config.get("run_id") or run.name)
        row = {"run_id": name, "status": _status(run, summary)} | summary
        row["run_id"] = name
        rows.append(row | {"wandb_id": run.id})
        configs.append(config)
        histories[name] = lambda run=run: pd.DataFrame(list(run.scan_history()))
    return pd.DataFrame(rows), configs, histories


def _api() -> Any:
    import wandb

    return wandb.Api()


def _status(run: Any, summary: dict[str, Any]) -> str:
    """The status in the summary if there is one, else W&B's state in the vocabulary of the harness."""
    if summary.get("status"):
        return str(summary["status"])
    return {"finished": "done", "running": "unfinished", "crashed": "failed", "failed": "failed"}.get(
        str(run.state), str(run.state)
    )


def _plain(mapping: Any) -> dict[str, Any]:
    """A dict from what the API returns: a mapping, its `_json_dict`, or JSON text."""
    if isinstance(mapping, str):
        mapping = json.loads(mapping)
    mapping = getattr(mapping, "_json_dict", mapping)
    return dict(mapping)
