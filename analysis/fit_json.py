"""The JSON form of a fit. Law name, parameters, covariance and a hash of the data: nothing in it is code."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.laws import LAWS
from analysis.notes import Note
from analysis.result import FitResult, Status
from harness.errors import UserError

SCHEMA = 1


def to_dict(result: FitResult) -> dict[str, Any]:
    """The contract's keys first, then what `read` needs; what is not finite is null."""
    failed = result.status is Status.FAILED
    values, intervals = result.values, result.intervals
    params = {name: {"value": values[name], "lo": intervals[name][0], "hi": intervals[name][1]} for name in values}
    return _json(
        {
            "law": result.law.name,
            "formula": result.law.formula,
            "params": {} if failed else params,
            "cov": [] if failed else result.cov,
            "rss_log": result.rss,
            "notes": [entry.as_dict() for entry in result.notes],
            "status": result.status.value,
            "level": result.level,
            "ci": result.ci,
            "space": result.space,
            "robust": result.robust,
            "points": result.points,
            "dof": result.dof,
            "starts": result.starts,
            "starts_at_optimum": result.reached,
            "columns": result.columns,
            "domain": result.domain,
            "weighting": result.weighting,
            "nested": result.nested,
            "excluded": result.excluded,
            "data_sha256": result.data_hash,
            "centred": {
                "theta": result.theta,
                "means": result.means,
                "y_mean": result.y_mean,
                "cov": result.theta_cov,
            },
            "schema": SCHEMA,
        }
    )


def read(path: Path) -> FitResult:
    """The fit in a file. Raises `UserError` when it cannot be read or is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["law"] not in LAWS:
            raise UserError(f"{path}: law {content['law']!r} is not known here")
        law, centred = LAWS[content["law"]], content["centred"]
        size = len(law.params)
        return FitResult(
            law=law,
            theta=np.array(centred["theta"], dtype=float).reshape(size),
            means=dict(centred["means"]),
            y_mean=float(centred["y_mean"]),
            theta_cov=np.array(centred["cov"], dtype=float).reshape(size, size),
            intervals={name: (entry["lo"], entry["hi"]) for name, entry in content["params"].items()}
            or dict.fromkeys(law.params, (None, None)),
            rss=float("nan") if content["rss_log"] is None else float(content["rss_log"]),
            dof=content["dof"],
            points=content["points"],
            notes=[Note(**entry) for entry in content["notes"]],
            status=Status(content["status"]),
            level=content["level"],
            ci=content["ci"],
            space=content["space"],
            robust=content["robust"],
            reached=content["starts_at_optimum"],
            starts=content["starts"],
            columns=content["columns"],
            domain={name: (span[0], span[1]) for name, span in content["domain"].items()},
            weighting=content["weighting"],
            nested=content["nested"],
            excluded=content.get("excluded", []),
            data_hash=content["data_sha256"],
        )
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as problem:
        text = str(problem) or type(problem).__name__
        raise UserError(f"{path} is not a fit written by this package ({text.splitlines()[0][:100]})") from None


def _json(value: Any) -> Any:
    """Plain JSON: arrays as lists, what is not finite as null."""
    if isinstance(value, np.ndarray):
        return _json(value.tolist())
    if isinstance(value, Mapping):
        return {key: _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
