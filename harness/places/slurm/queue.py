"""The arrays of a sweep, and which of their elements are queued or running. Loads no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness.places.slurm import client
from harness.record import names
from harness.record.result import FINAL
from harness.record.run import Run
from harness.record.state import state_of
from harness.schema import FILE_NAME, list_of, read_json
from harness.terminal import say

POLL_S = 15.0
"""Between two looks at a sweep that is waited for."""


def arrays_root(sweep_dir: Path) -> Path:
    return sweep_dir / names.SLURM


def arrays(sweep_dir: Path) -> list[Path]:
    """Directories of all arrays that were submitted for a sweep."""
    return sorted(path.parent for path in arrays_root(sweep_dir).glob("*/runs.json"))


def live_elements(sweep_dir: Path) -> Iterator[tuple[client.Element, list[str]]]:
    """The queued and running elements of a sweep's arrays, each with the run_ids that it trains."""
    tables = {directory.name: directory for directory in arrays(sweep_dir)}
    read: dict[str, list[list[str]]] = {}
    for element in client.elements(list(tables)):
        if element.name not in read:
            read[element.name] = read_table(tables[element.name])
        if element.index < len(read[element.name]):
            yield element, read[element.name][element.index]


def read_table(array: Path) -> list[list[str]]:
    """The run_ids of each element of an array. Raises `UserError` when the file is damaged."""
    advice = f"cancel its jobs with scancel and remove {array}"
    return read_json(array / "runs.json", list_of(list_of(FILE_NAME)), advice)


def wait_for(runs: Sequence[Run]) -> None:
    """Wait until no run is queued or running, also while the controller does not answer."""
    sweep_dirs = {run.sweep_dir for run in runs}

    def ended() -> bool:
        return all(state_of(run.run_dir).status in (*FINAL, "failed") for run in runs) or not any(
            True for sweep_dir in sweep_dirs for _ in live_elements(sweep_dir)
        )

    wait_until(ended, POLL_S)


def wait_until(ended: Callable[[], bool], poll_s: float) -> None:
    """Ask until the answer is yes, also while the controller does not answer."""
    said = False
    while True:
        try:
            if ended():
                return
        except client.SlurmError as error:
            if not said:
                say(f"Slurm does not answer ({error}); the jobs are not affected, still waiting")
            said = True
        time.sleep(poll_s)
