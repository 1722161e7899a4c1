"""`metrics.jsonl`: the complete record of a run, one JSON object per line. Dashboards mirror it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.files import open_own, representable, write_text_atomic


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

    Raises `ValueError` naming the line when a line before the last is not JSON; `skip_damaged` leaves such lines out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    content = []
    for number, line in enumerate(lines, start=1):
        try:
            content.append(json.loads(line))
        except (ValueError, RecursionError) as error:  # also a number of more digits than Python reads
            if skip_damaged or number == len(lines):
                continue
            raise ValueError(f"{path}, line {number} is damaged ({error}); the record cannot be read") from error
    return content


def last(path: Path, tail_bytes: int = 8192) -> dict[str, Any]:
    """The newest value of every key in the last few kilobytes of a record; empty when there is none.

    Cheap enough to ask of thousands of runs.
    """
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            start = max(file.tell() - tail_bytes, 0)
            file.seek(start)
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    newest: dict[str, Any] = {}
    for line in lines[1 if start else 0 :]:
        try:
            newest.update(json.loads(line))
        except json.JSONDecodeError:
            continue  # being written this moment
    return newest


def cut_back(path: Path, position: int) -> None:
    """Remove everything after `position`, and a torn last line.

    `position` is what `MetricsFile.position` returned when the checkpoint was saved from which the run goes on.
    """
    if not path.exists():
        return
    content = path.read_bytes()[:position]
    whole = content[: content.rfind(b"\n") + 1]
    if path.stat().st_size != len(whole):
        write_text_atomic(path, whole.decode("utf-8"))
