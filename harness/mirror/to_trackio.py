"""trackio: a database in `<out>/.trackio/`. Nothing leaves the machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is
set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trackio  # pyright: ignore[reportMissingImports] - an extra

from harness.config import Config, to_container
from harness.mirror.ids import copy_id
from harness.mirror.wandb_settings import PROJECT


class TrackioRun:
    """One run of trackio, open."""

    def __init__(self, run_dir: Path, config: Config) -> None:
        project = config.tracker.project or PROJECT
        self.note = f"look at it: TRACKIO_DIR={trackio.utils.TRACKIO_DIR} trackio show --project {project}"
        self._run = trackio.init(
            project=project,
            name=copy_id(run_dir, "trackio"),
            group=config.sweep,
            config={**to_container(config), "run_id": run_dir.name},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.next_step = self._run._next_step

    def log(self, line: Mapping[str, Any]) -> None:
        values = {name: value for name, value in line.items() if name != "step" and value is not None}
        self._run.log(values, step=int(line["step"]))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Numbers of the summary become `final/<name>`, one step after the last. trackio has no exit code."""
        step = int(summary.get("steps", -1)) + 1
        if step and step >= self.next_step:  # else they are there
            numbers = {k: v for k, v in summary.items() if isinstance(v, int | float)}
            self._run.log({f"final/{name}": value for name, value in numbers.items()}, step=step)
        trackio.finish()  # of the run that this thread began
