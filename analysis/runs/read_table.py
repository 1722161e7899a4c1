"""Tables from files and from other libraries, as pandas frames."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.notes import Note, note
from harness.errors import UserError


def _unzstd(content: bytes) -> bytes:
    import pyarrow  # the standard library of Python 3.11 cannot read it

    return pyarrow.input_stream(pyarrow.py_buffer(content), compression="zstd").read()


COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _unzstd,
}
"""Suffix → how its content is read; it follows the suffix of the table, e.g. `runs.csv.gz`."""

TABLES = (".csv", ".tsv", ".txt", ".parquet", ".json", ".jsonl")


def read_file(path: Path) -> tuple[pd.DataFrame, list[Note]]:
    """A file of `TABLES`, compressed or not, as a frame, and what had to be decided to read it.

    Raises `UserError` if the file is none of these, is damaged or holds no table.
    """
    name = path.name.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(packed)).suffix
    if suffix not in TABLES:
        known = f"use .csv, .tsv or .parquet (or {', '.join(TABLES[2:3] + TABLES[4:])}), alone or with "
        raise UserError(f"{path}: unknown kind of table {path.suffix!r}; {known}{', '.join(COMPRESSED)}")
    try:
        content = path.read_bytes()
        content = COMPRESSED[packed](content) if packed else content
        if suffix == ".parquet":
            frame, notes = pd.read_parquet(io.BytesIO(content)), []
        elif suffix in (".json", ".jsonl"):
            frame, notes = _records(content.decode("utf-8-sig"), lines=suffix == ".jsonl"), []
        else:
            frame, notes = _delimited(content.decode("utf-8-sig"), suffix)
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty") from None
    except pd.errors.ParserError as problem:
        raise UserError(f"{path} cannot be read as a table: {str(problem).strip()}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8; save it as CSV in UTF-8, or as Parquet") from None
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from None
    except (OSError, EOFError, ValueError, RecursionError, csv.Error, lzma.LZMAError, zlib.error) as problem:
        text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        raise UserError(f"{path} cannot be read: {text.splitlines()[0]}") from None
    if frame.shape[1] == 1 and any(mark in str(frame.columns[0]) for mark in ";\t|"):
        raise UserError(f"{path}: one column {frame.columns[0]!r}; columns must be separated by commas (or use .tsv)")
    if frame.empty:
        raise UserError(f"{path} has a header but no rows")
    return frame, notes


def _delimited(text: str, suffix: str) -> tuple[pd.DataFrame, list[Note]]:
    """A table in text. Only lines that begin with `#` are comments; one that fits the rows is the header if there is no
    other. `.txt` may be separated by blanks, as numpy writes it."""
    kept, leading, inner, quoted = [], [], [], False
    for line in io.StringIO(text, newline=None):
        if not quoted and line.lstrip().startswith("#"):
            (inner if kept else leading).append(line.strip().lstrip("#").strip())
        elif kept or line.strip():
            kept.append(line)
            quoted ^= line.count('"') % 2 == 1
    if not kept:
        raise pd.errors.EmptyDataError
    separator = {".csv": ",", ".tsv": "\t"}.get(suffix, "," if "," in kept[0] else r"\s+")
    first = _fields(kept[0], separator)
    if any(map(_is_number, first)):
        for comment in leading:
            fields = _fields(comment, separator)
            if len(fields) == len(first) and all(fields) and not any(map(_is_number, fields)):
                kept.insert(0, comment + "\n")
                first = fields
                break
    body = "".join(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:  # without `index_col`, a field more than the header has would shift all columns
            frame = pd.read_csv(
                io.StringIO(body), sep=separator, skipinitialspace=True, low_memory=False, index_col=False
            )
        except pd.errors.ParserWarning:
            raise UserError("its rows have more fields than its header; give every column a name") from None
    header = pd.read_csv(io.StringIO(body), sep=separator, skipinitialspace=True, header=None, nrows=1, dtype=str)
    names = [str(name).strip() if isinstance(name, str) else "" for name in header.iloc[0]]
    if len(names) == frame.shape[1]:  # pandas numbers repeated names, here they stay as they are
        frame.columns = [name or str(column) for name, column in zip(names, frame.columns, strict=True)]
    like_rows = sum(len(_fields(comment, separator)) == len(first) for comment in inner) if len(first) > 1 else 0
    notes = []
    if like_rows:
        message = f"{like_rows} line(s) that begin with # have as many fields as a row and were read as comments"
        notes.append(note("commented_rows", "warning", message))
    return frame, notes


def _fields(line: str, separator: str) -> list[str]:
    if separator == r"\s+":
        return line.split()
    rows = list(csv.reader([line], delimiter=separator, skipinitialspace=True))
    return [field.strip() for field in rows[0]] if rows else []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _records(text: str, *, lines: bool) -> pd.DataFrame:
    """JSON: a list of objects, one for each row, or an object of columns; nested objects become `outer.inner`."""
    if not text.strip():
        raise pd.errors.EmptyDataError
    if lines:
        content = []
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                content += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as problem:
                raise UserError(f"line {number} is not JSON ({str(problem).splitlines()[0]})") from None
    else:
        content = json.loads(text)
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return pd.json_normalize(content)
    if isinstance(content, dict) and any(isinstance(column, list | dict) for column in content.values()):
        return pd.DataFrame(content)
    raise UserError("it holds neither a list of objects (one for each row) nor an object of columns")


def as_frame(source: Any) -> pd.DataFrame | None:
    """A table of another library as a pandas frame, or None if it is no table.

    Read are pandas frames and series, whatever speaks Arrow (polars, pyarrow, duckdb) or has `to_pandas`, numpy arrays
    with named fields, mappings of columns, and lists of mappings (one for each row). Raises `UserError` if one cannot
    be converted.
    """
    try:
        if isinstance(source, pd.Series):
            frame = source.to_frame(source.name if source.name is not None else "value")
        elif isinstance(source, pd.DataFrame):
            frame = source
        elif hasattr(source, "__arrow_c_stream__"):
            import pyarrow

            frame = pyarrow.table(source).to_pandas()
        elif callable(getattr(source, "to_pandas", None)):
            frame = source.to_pandas()
        elif isinstance(source, np.ndarray) and source.dtype.names:
            frame = pd.DataFrame({name: _native(source[name].ravel()) for name in source.dtype.names})
        elif isinstance(source, Mapping):
            scalar = all(np.ndim(value) == 0 for value in source.values())
            frame = pd.DataFrame([dict(source)] if scalar else dict(source))
        elif isinstance(source, list | tuple) and source and all(isinstance(row, Mapping) for row in source):
            if any(
                isinstance(value, list | tuple | np.ndarray | pd.Series) for row in source for value in row.values()
            ):
                return None  # several tables
            frame = pd.DataFrame([dict(row) for row in source])
        else:
            return None
        if not isinstance(frame, pd.DataFrame):
            raise TypeError(f"its to_pandas returns a {type(frame).__name__}")
    except (ValueError, TypeError, AttributeError, ImportError, NotImplementedError) as problem:
        text = (str(problem) or type(problem).__name__).splitlines()[0]
        raise UserError(f"this {type(source).__name__} cannot be read as a table: {text}") from None
    return plain_frame(frame)


def _native(values: np.ndarray) -> Any:
    """An array in this machine's byte order; text instead of bytes."""
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8", "replace")
    return values.astype(values.dtype.newbyteorder("="))


def plain_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy whose columns have plain names and whose rows are numbered; named levels of the index become columns."""
    frame = frame.copy()
    if frame.columns.nlevels > 1:
        frame.columns = [".".join(str(part) for part in name if str(part)) for name in frame.columns]
    frame.columns = [str(column) for column in frame.columns]
    levels = [name for name in frame.index.names if name is not None and str(name) not in frame.columns]
    frame = frame.reset_index(level=levels) if levels else frame
    frame.columns = [str(column) for column in frame.columns]
    return frame.reset_index(drop=True)
