"""What all mirrors share: how a copy is opened, and how a record is copied into it."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from harness.config import Config, TrackerConfig
from harness.errors import UserError
from harness.files import open_plain
from harness.record.metrics import parse_line

TITLES = {"wandb": "W&B", "tensorboard": "TensorBoard", "trackio": "trackio"}
"""Tracker -> its name in messages. The tracker is also the name of its package."""

_importing = threading.Lock()


class Copy(Protocol):
    """The open copy of one run at a tracker. Every method may raise what the tracker's package raises."""

    next_step: int
    """First optimiser step that the copy does not hold yet."""
    note: str
    """How to look at it or send it on, for a person; may be empty."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Copy a line of `metrics.jsonl`; it has `step` and `tokens`."""
        ...

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Add the final values and close the copy."""
        ...


def check(tracker: TrackerConfig) -> None:
    """Raises `UserError` if the package of the tracker is not installed."""
    name = tracker.name
    if name != "none" and importlib.util.find_spec(name) is None:
        package = "wandb" if name == "wandb" else f"'sae-scaling[{name}]'"
        raise UserError(f"tracker={name} needs the package {name}: pip install {package}, or choose tracker=none")


def open_copy(run_dir: Path, config: Config, *, live: bool) -> Copy:
    """Open the copy of a run at `config.tracker`.

    With `live`, W&B records offline if its server cannot be reached, and says so. Otherwise that is an error.
    Raises what the tracker's package raises.
    """
    with _importing:  # threads that import a package at once may see half of it
        if config.tracker.name == "wandb":
            from harness.mirror import to_wandb

            make = to_wandb.open_live if live else to_wandb.WandbRun
        elif config.tracker.name == "tensorboard":
            from harness.mirror.to_tensorboard import TensorboardRun as make
        else:
            # read when trackio is imported; by default it writes to the home directory and asks the hub who you are
            os.environ.setdefault("TRACKIO_DIR", str(run_dir.parent.parent / ".trackio"))
            if not os.environ.get("TRACKIO_SPACE_ID"):
                os.environ.setdefault("HF_HUB_OFFLINE", "1")
            from harness.mirror.to_trackio import TrackioRun as make
    return make(run_dir, config)


class Tail:
    """Reads the lines of a growing `metrics.jsonl`, each once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode, self._position = -1, 0
        self._step, self._at_step = -1, 0
        """Step of the last line returned, and how many lines of this step were returned."""
        self._skip = 0
        """Lines of `_step` that are yet to be skipped because they were returned before a cut."""

    def read(self) -> list[dict[str, Any]]:
        """The lines written since the last call. A torn last line is left for the next call.

        A resume cuts the record back and writes some steps again; those are not returned again.
        Raises `ValueError` if the file cannot be read or a whole line is damaged.
        """
        try:
            file = open_plain(self._path)
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._position:
                self._inode, self._position, self._skip = status.st_ino, 0, self._at_step
            file.seek(self._position)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._position += len(whole)
        lines = [parse_line(text) for text in whole.split(b"\n")[:-1]]
        if any("step" not in line for line in lines):
            raise ValueError("a line has no step")
        return [line for line in lines if self._is_new(line["step"])]

    def _is_new(self, step: int) -> bool:
        if step < self._step:
            return False
        if step == self._step and self._skip:
            self._skip -= 1
            return False
        self._at_step = self._at_step + 1 if step == self._step else 1
        self._step, self._skip = step, 0
        return True


def send(copy: Copy, lines: list[dict[str, Any]]) -> None:
    """Copy those lines that the copy does not hold yet."""
    for line in lines:
        if line["step"] >= copy.next_step:
            copy.log(line)


def finish(copy: Copy, result: Mapping[str, Any]) -> None:
    """Close a copy with the scalars of `result.json`; the exit code says whether the run is done."""
    scalars = {name: value for name, value in result.items() if isinstance(value, str | int | float | bool)}
    copy.finish(scalars, 0 if result.get("status") == "done" else 1)
