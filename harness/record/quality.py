"""`quality/<metric>.json` in a run directory: what a metric found, and the files of its values per latent. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.files import replacing, write_json_atomic
from harness.record import names
from harness.schema import (
    FILE_NAME,
    OBJECT,
    TEXT,
    dict_of,
    fields,
    list_of,
    number,
    optional,
    read_json,
    sealed,
    whole,
    with_seal,
)

if TYPE_CHECKING:
    import numpy as np

_QUALITY = sealed(
    fields(
        {
            "metric": TEXT,
            "version": whole(1),
            "settings": OBJECT,
            "weights": TEXT,
            "tokens": whole(),
            "values": dict_of(fields({"value": optional(number()), "se": optional(number(0))})),
            "per_latent": optional(FILE_NAME),
            "per_document": optional(FILE_NAME),
            "curves?": dict_of(list_of(OBJECT)),
        }
    )
)


class Value(NamedTuple):
    """A number with its standard error; None where none is known."""

    value: float
    se: float | None = None


def quality_path(run_dir: Path, metric: str) -> Path:
    return run_dir / names.QUALITY / f"{metric}.json"


def read_quality(run_dir: Path, metric: str) -> dict[str, Any] | None:
    """What a metric found; None if it has not been evaluated. Raises `UserError` for a damaged file."""
    try:
        advice = "remove it and evaluate the run again"
        return read_json(quality_path(run_dir, metric), _QUALITY, advice)
    except FileNotFoundError:
        return None


def read_qualities(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Metric → what it found, for every metric that was evaluated; nothing of a run that may not be read. Raises
    `UserError` for a damaged file."""
    try:
        metrics = sorted(path.stem for path in (run_dir / names.QUALITY).glob("*.json"))
    except PermissionError:
        return {}
    found = ((metric, read_quality(run_dir, metric)) for metric in metrics)
    return {metric: content for metric, content in found if content is not None}


def write_quality(
    run_dir: Path,
    about: Mapping[str, Any],
    values: Mapping[str, Value],
    per_latent: Mapping[str, np.ndarray],
    per_document: Mapping[str, np.ndarray],
    curves: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Write the result of `about["metric"]`, its JSON last. `about`: metric, version, settings, weights, tokens."""
    metric = about["metric"]
    (run_dir / names.QUALITY).mkdir(parents=True, exist_ok=True)
    written = {}
    for kind, columns in (("per_latent", per_latent), ("per_document", per_document)):
        written[kind] = f"{metric}.{kind}.parquet" if columns else None
        if columns:
            _write_parquet(run_dir / names.QUALITY / f"{metric}.{kind}.parquet", columns)
    content = {
        **about,
        "values": {name: value._asdict() for name, value in values.items()},
        **written,
        "curves": dict(curves),
    }
    write_json_atomic(quality_path(run_dir, metric), with_seal(content))


def _write_parquet(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    import pyarrow
    import pyarrow.parquet

    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), temporary)
