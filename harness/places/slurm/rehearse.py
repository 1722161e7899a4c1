"""Rehearsals on Slurm: one short job per mesh, submitted like any other, and waited for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config import ClusterConfig
from harness.cost.limits import time_limit
from harness.errors import FAILED, WRONG_REQUEST, UserError
from harness.files import fsync_directory, last_line, write_text_atomic
from harness.places.rehearsal import STOP_AFTER, in_a_line
from harness.places.slurm import client
from harness.places.slurm.queue import arrays_root, wait_until
from harness.places.slurm.script import rehearsal_script
from harness.places.slurm.submit import array_directory, write_tables
from harness.places.slurm.task import log_end
from harness.record.job import Job
from harness.record.provenance import command_line
from harness.record.rundir import attempts
from harness.terminal import counted, say

MINUTES = 10
"""What a job asks for to begin with, for example to compute a few activations; and then for each of its rehearsals …"""
MINUTES_EACH = 5
POLL_S = 5.0
"""Between two looks at the queue."""
PATIENCE_S = 30.0
"""How long files that a node has written may take to be seen here."""


@dataclass(frozen=True)
class _Array:
    directory: Path
    job_id: str
    jobs: Sequence[Job]


def rehearse_on_slurm(jobs: Sequence[Job]) -> list[str]:
    """Train short jobs on the nodes where their like will run. Returns why each failed, in a line; empty if it did not.

    Raises `UserError` when Slurm refuses a job. On any exception all jobs are cancelled.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(repr((job.config.mesh, job.config.cluster)), []).append(job)
    submitted: list[_Array] = []
    try:
        for group in groups.values():
            submitted.append(_submit(group))
            say(f"job {submitted[-1].job_id} rehearses {counted(len(group), 'shape')}")
        names = [array.directory.name for array in submitted]
        wait_until(lambda: not client.elements(names), POLL_S)
    except BaseException as error:
        for array in submitted:
            client.insist("scancel", array.job_id)
        if isinstance(error, client.SlurmError):
            raise UserError(f"Slurm refused: {error}; what a job asks for is set by cluster.*=…") from error
        raise
    told = {job.home: why for array in submitted for job, why in _outcomes(array)}
    return [told[job.home] for job in jobs]


def _submit(jobs: Sequence[Job]) -> _Array:
    sweep_dir, config = jobs[0].runs[0].sweep_dir, jobs[0].config
    arrays_root(sweep_dir).mkdir(parents=True, exist_ok=True)
    directory = array_directory(sweep_dir, "rehearsal")
    write_tables(directory, jobs)
    about = f"rehearses {counted(len(jobs), 'shape')} of {sweep_dir.name}; {command_line()}"
    cluster = _short(config.cluster, len(jobs))
    text = rehearsal_script(directory.resolve(), cluster, config.mesh, len(jobs), STOP_AFTER, about=about)
    write_text_atomic(directory / "job.sh", text)
    fsync_directory(directory)
    return _Array(directory, client.submit(str(directory / "job.sh")), jobs)


def _short(cluster: ClusterConfig, count: int) -> ClusterConfig:
    """What a short job asks for: less time, so that it starts soon, and no second start."""
    minutes = min(MINUTES + MINUTES_EACH * count, max(1, int(time_limit(cluster.time) // 60)))
    return dataclasses.replace(cluster, time=str(minutes), requeue=False)


def _outcomes(array: _Array) -> Iterator[tuple[Job, str]]:
    for index, job in enumerate(array.jobs):
        code = _exit_code(array.directory / f"exit-{index}")
        if code is None:
            yield job, _gone(array)
        elif code in (FAILED, WRONG_REQUEST) and attempts(job.home):
            yield job, in_a_line(log_end(job.home, code))  # a rank had time to say why
        else:
            output = last_line(array.directory / "log" / f"{index}.txt")
            yield job, in_a_line(f"exit code {code}: {output}") if code else ""


def _exit_code(path: Path) -> int | None:
    """What the script wrote; None when it ended before it could."""
    patience_ends = time.monotonic() + PATIENCE_S
    while not path.exists() and time.monotonic() < patience_ends:
        time.sleep(0.2)
    return int(path.read_text()) if path.exists() else None


def _gone(array: _Array) -> str:
    end = client.ends(array.job_id).get(0)
    return "the job ended before it" if end is None else f"the job ended before it: {end.state} ({end.reason})"
