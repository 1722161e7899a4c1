"""`metrics.jsonl`: the complete record of a run, one JSON object per line. Dashboards mirror it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.files import open_own, open_plain, replacing, representable
from harness.schema import dict_of, number, optional, parse_json

LINE = dict_of(optional(number()))
"""A line of the record: names and numbers."""


def parse_line(line: str | bytes) -> dict[str, Any]:
    """A line of the record. Raises `ValueError` if it is not one."""
    content = parse_json(line)
    LINE(content, "")
    return content


class MetricsFile:
    """Appends lines to `metrics.jsonl`; each reaches the file at once.

    NaN and infinity, which JSON lacks, become null. When a run is resumed, call `cut_back` before opening it.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_own(path, "a", encoding="utf-8")

    def append(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(representable(line), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when everything appended is on the disk. Called before a checkpoint that relies on it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def position(self) -> int:
        """Bytes of the lines so far: a resumed run cuts the file here."""
        self._file.flush()
        return self._file.tell()

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NullMetrics:
    """Records nothing: for the ranks that do not write."""

    def append(self, line: Mapping[str, Any]) -> None:
        pass

    def sync(self) -> None:
        pass

    def position(self) -> int:
        return 0


def read(path: Path, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """All lines of a record; empty when there is none. A torn last line (from a kill) is left out.

    Raises `UserError` when it cannot be read, and naming the line when a line before the last is damaged;
    `skip_damaged` leaves such lines out.
    """
    try:
        with open_plain(path) as file:
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    content = []
    for place, line in enumerate(lines, start=1):
        try:
            content.append(parse_line(line))
        except ValueError as error:
            if skip_damaged or place == len(lines):
                continue
            raise UserError(f"{path}, line {place} is damaged ({error}); the record cannot be read") from error
    return content


def last(path: Path, tail_bytes: int = 8192) -> dict[str, Any]:
    """The newest value of every key in the last few kilobytes of a record; empty when there is none. Raises
    `UserError` when it cannot be read.

    Cheap enough to ask of thousands of runs.
    """
    try:
        with open_plain(path) as file:
            file.seek(0, os.SEEK_END)
            start = max(file.tell() - tail_bytes, 0)
            file.seek(start)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    newest: dict[str, Any] = {}
    for line in lines[1 if start else 0 :]:
        try:
            newest.update(parse_line(line))
        except ValueError:
            continue  # damaged, or being written this moment
    return newest


def cut_back(path: Path, position: int) -> None:
    """Remove everything after `position`, and a torn last line.

    `position` is what `MetricsFile.position` returned when the checkpoint was saved from which the run goes on.
    """
    try:
        with open_plain(path) as file:
            content = file.read()
    except FileNotFoundError:
        return
    whole = content[: content.rfind(b"\n", 0, position) + 1]
    if len(content) != len(whole):
        with replacing(path) as temporary:
            temporary.write_bytes(whole)
