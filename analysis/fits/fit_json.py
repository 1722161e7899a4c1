"""The JSON form of a fit: law name, parameters, covariance and a hash of the data. Nothing in it is code.

A fit is passed as the fields of its `FitResult` by name, so that this module needs to know their names only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.fits.status import Status
from analysis.laws.catalogue import get
from analysis.laws.law import Array
from analysis.notes import Note
from harness.errors import UserError

SCHEMA = 1


def content_of(fields: Mapping[str, Any], values: Mapping[str, float], cov: Array) -> dict[str, Any]:
    """The content of `fit.json`: the documented keys first, then what `read` needs; null for non-finite numbers.

    Args:
        fields: The fields of a `FitResult`.
        values: Name → estimate, as reported.
        cov: Covariance of the reported parameters (params, params).
    """
    law, intervals = fields["law"], fields["intervals"]
    failed = fields["status"] is Status.FAILED
    params = {name: {"value": values[name], "lo": intervals[name][0], "hi": intervals[name][1]} for name in values}
    return _plain(
        {
            "law": law.name,
            "formula": law.formula,
            "params": {} if failed else params,
            "cov": [] if failed else cov,
            "rss_log": fields["rss"],
            "notes": [entry.as_dict() for entry in fields["notes"]],
            "status": fields["status"].value,
            "level": fields["level"],
            "ci": fields["ci"],
            "space": "log",
            "robust": fields["robust"],
            "points": fields["points"],
            "dof": fields["dof"],
            "run_variance": fields["run_variance"],
            "starts": fields["starts"],
            "starts_at_optimum": fields["reached"],
            "columns": fields["columns"],
            "domain": fields["domain"],
            "weighting": fields["weighting"],
            "nested": fields["nested"],
            "regime": fields["regime"],
            "influences": [vars(entry) for entry in fields["influences"]],
            "excluded": fields["excluded"],
            "data_sha256": fields["data_hash"],
            "centred": {
                "theta": fields["theta"],
                "means": fields["means"],
                "y_mean": fields["y_mean"],
                "cov": fields["theta_cov"],
            },
            "schema": SCHEMA,
        }
    )


def read(path: Path) -> dict[str, Any]:
    """The fields of the fit in a file, by name. Raises `UserError` if it cannot be read or is not a fit."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        law, centred = get(content["law"]), content["centred"]
        size = len(law.params)
        return {
            "law": law,
            "theta": np.array(centred["theta"], dtype=float).reshape(size),
            "means": dict(centred["means"]),
            "y_mean": float(centred["y_mean"]),
            "theta_cov": np.array(centred["cov"], dtype=float).reshape(size, size),
            "intervals": {name: (entry["lo"], entry["hi"]) for name, entry in content["params"].items()}
            or dict.fromkeys(law.params, (None, None)),
            "rss": float("nan") if content["rss_log"] is None else float(content["rss_log"]),
            "dof": content["dof"],
            "points": content["points"],
            "run_variance": content.get("run_variance", 0.0),
            "notes": [Note(**entry) for entry in content["notes"]],
            "status": Status(content["status"]),
            "level": content["level"],
            "ci": content["ci"],
            "robust": content["robust"],
            "reached": content["starts_at_optimum"],
            "starts": content["starts"],
            "columns": content["columns"],
            "domain": {name: (span[0], span[1]) for name, span in content["domain"].items()},
            "weighting": content["weighting"],
            "nested": content["nested"],
            "regime": content.get("regime", ""),
            "excluded": content.get("excluded", []),
            "data_hash": content["data_sha256"],
        }
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None
    except OSError as problem:
        raise UserError(f"{path} cannot be read: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as problem:
        text = str(problem) or type(problem).__name__
        raise UserError(f"{path} is not a fit written by this package ({text.splitlines()[0][:100]})") from None


def _plain(value: Any) -> Any:
    """Plain JSON: arrays become lists, non-finite numbers null."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
