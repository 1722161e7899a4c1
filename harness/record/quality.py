"""`quality/<metric>.json` in a run directory: what a metric found, and the files of its values per latent. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import UserError
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
            "tables?": dict_of(FILE_NAME),
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
    per_latent: Mapping[str, Any],
    per_document: Mapping[str, Any],
    curves: Mapping[str, list[dict[str, Any]]],
    tables: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the result of `about["metric"]`, its JSON last. `about`: metric, version, settings, weights, tokens.

    A table is columns by name, each an array with a number or a row of numbers per line, or a list of strings.
    """
    metric = about["metric"]
    (run_dir / names.QUALITY).mkdir(parents=True, exist_ok=True)
    all_tables = {"per_latent": per_latent, "per_document": per_document, **(tables or {})}
    files = {name: f"{metric}.{name}.parquet" for name, columns in all_tables.items() if columns}
    for name, file in files.items():
        _write_parquet(run_dir / names.QUALITY / file, all_tables[name])
    content = {
        **about,
        "values": {name: value._asdict() for name, value in values.items()},
        **{name: files.get(name) for name in ("per_latent", "per_document")},
        "curves": dict(curves),
        **({"tables": {name: files[name] for name in tables}} if tables else {}),
    }
    write_json_atomic(quality_path(run_dir, metric), with_seal(content))


def _write_parquet(path: Path, columns: Mapping[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    def column(values: Any) -> Any:
        if getattr(values, "ndim", 1) == 1:
            return values
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), values.shape[1])

    with replacing(path) as temporary:
        pyarrow.parquet.write_table(
            pyarrow.table({name: column(values) for name, values in columns.items()}), temporary, compression="zstd"
        )


def read_table(run_dir: Path, metric: str, name: str, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """Column → array with a line per row (lists for strings) of a table that `write_quality` wrote; `columns`: only
    these, of those that exist.

    Raises `UserError` if it is missing or cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    path = run_dir / names.QUALITY / f"{metric}.{name}.parquet"
    try:
        known = pyarrow.parquet.read_schema(path).names
        table = pyarrow.parquet.read_table(path, columns=[name for name in known if columns is None or name in columns])
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read ({reason}); evaluate the run again with --force") from error
    found: dict[str, Any] = {}
    for key in table.column_names:
        values = table.column(key).combine_chunks()
        if pyarrow.types.is_fixed_size_list(values.type):
            found[key] = values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
        elif pyarrow.types.is_string(values.type):
            found[key] = values.to_pylist()
        else:
            found[key] = values.to_numpy(zero_copy_only=False)
    return found
