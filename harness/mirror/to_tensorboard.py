"""TensorBoard: event files in `<run_dir>/tensorboard/`, written by the package `tensorboard` itself, without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportMissingImports]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]
from tensorboard.plugins.hparams.summary_v2 import hparams_pb  # pyright: ignore[reportMissingImports]
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]

from harness.config import Config, science

FLUSH_S = 2


class TensorboardRun:
    """The event file of one run, open.

    It is written anew from the start of the record each time, so no point is there twice after a resume.
    """

    next_step = 0

    def __init__(self, run_dir: Path, config: Config) -> None:
        folder = run_dir / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.note = f"look at it: tensorboard --logdir {run_dir.parent}"
        self._writer = EventFileWriter(str(folder), flush_secs=FLUSH_S)
        settings = {**_flat(science(config)), "sweep": config.sweep}
        self._write(hparams_pb(settings, trial_id=run_dir.name), 0)

    def log(self, line: Mapping[str, Any]) -> None:
        self._write_scalars({name: value for name, value in line.items() if name != "step"}, int(line["step"]))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Numbers of the summary become `final/<name>`. TensorBoard has no exit code."""
        final = {f"final/{name}": value for name, value in summary.items()}
        self._write_scalars(final, int(summary.get("steps", 0)))
        self._writer.close()

    def _write_scalars(self, values: Mapping[str, Any], step: int) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._write(
            Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]), step
        )

    def _write(self, summary: Summary, step: int) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, of the types that TensorBoard takes."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
