"""Why a run does not train: what Slurm says of its newest job, in words, and what the log of the job says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from harness.errors import UserError
from harness.files import last_line
from harness.places.slurm import client
from harness.places.slurm.queue import arrays, read_table
from harness.record import names
from harness.record.rundir import attempts

FAILED_STATES = ("FAILED", "BOOT_FAIL", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")

ANSWER_S = 10.0
"""How long to wait for Slurm: the rest of a status comes from files."""

WAITS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "jobs of higher priority come first",
    "Resources": "what it asks for is in use",
    "Dependency": "another job of this sweep must end first",
    "DependencyNeverSatisfied": "the job that makes its activations failed",
    "JobArrayTaskLimit": "cluster.max_running jobs run already",
    "BeginTime": "Slurm starts a requeued job after a pause",
    "JobHeldUser": "it is held; `scontrol release` lets it start",
    "JobHeldAdmin": "Slurm or an administrator holds it; `scontrol release` may let it start",
    "launch failed requeued held": "Slurm could not start it and holds it; `scontrol release` tries again",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "PartitionTimeLimit": "cluster.time is above the limit of the partition",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "AssocGrpGRES": "the account uses all the GPUs it may",
    "QOSMaxGRESPerUser": "you use all the GPUs you may",
    "QOSMaxJobsPerUserLimit": "you run as many jobs as you may",
    "Licenses": "licenses are in use",
    "JobLaunchFailure": "Slurm could not start its script; can the node write into the directory of its log?",
    "NodeDown": "its node failed",
    "TimeLimit": "its time limit was over",
    "OutOfMemory": "it used more than cluster.mem",
    "NonZeroExitCode": "its script failed",
    "RaisedSignal:53(Real-time_signal_19)": "Slurm could not start its script on the node",
}
"""Slurm's word for why a job waits or has failed → ours."""


class Told(NamedTuple):
    failed: bool
    """Whether the job ended before it could train."""
    text: str
    log: Path | None
    """Output of the job, if there is any."""


class _Job(NamedTuple):
    directory: Path
    """Of its array."""
    array_id: str
    element: int

    @property
    def id(self) -> str:
        return f"{self.array_id}_{self.element}"

    def log(self) -> Path | None:
        """A job that was submitted anew has another id, and a log of its own."""
        logs = (self.directory / "log").glob(f"*_{self.element}.out")
        return max(logs, key=lambda path: path.stat().st_mtime, default=None)


def explain(sweep_dir: Path, begun: Mapping[str, bool]) -> dict[str, Told]:
    """run_id → what became of its newest job, for runs that do not train now and have not ended.

    `begun` are those runs, and whether each has trained before. Runs without a job are left out, and all are when Slurm
    is not on this machine or does not answer.
    """
    jobs = {run_id: job for run_id, job in _newest_jobs(sweep_dir).items() if run_id in begun}
    if not jobs:
        return {}
    try:
        live = client.elements([job.directory.name for job in jobs.values()], ANSWER_S)
        queued = {(element.name, element.index): element for element in live}
        gone = {job.array_id for job in jobs.values() if (job.directory.name, job.element) not in queued}
        ends = {
            f"{array_id}_{index}": end for array_id in gone for index, end in client.ends(array_id, ANSWER_S).items()
        }
    except (UserError, client.SlurmError):
        return {}
    told = {}
    for run_id, job in jobs.items():
        element = queued.get((job.directory.name, job.element))
        if element is not None:
            told[run_id] = _of_queued(element, job)
        elif (gone_job := _of_gone(job, ends.get(job.id), begun[run_id])) is not None:
            told[run_id] = gone_job
    return told


def harvests_that_never_began(sweep_dir: Path) -> list[str]:
    """A line per job that was to make a store and ended before it could."""
    lines = []
    for _, directory, array_id in _submitted(sweep_dir):
        if (directory / names.CONFIG).is_file() and not attempts(directory):  # only arrays that harvest have one
            with suppress(UserError, client.SlurmError):
                end = client.ends(array_id, ANSWER_S).get(0)
                told = None if end is None else _of_gone(_Job(directory, array_id, 0), end, begun=False)
                if told is not None and end is not None and end.state in FAILED_STATES:
                    lines.append(f"{directory.name}: {told.text}" + (f" (log: {told.log})" if told.log else ""))
    return lines


def _newest_jobs(sweep_dir: Path) -> dict[str, _Job]:
    return {
        run_id: _Job(directory, array_id, index)
        for _, directory, array_id in _submitted(sweep_dir)
        for index, run_ids in enumerate(read_table(directory))
        for run_id in run_ids
    }


def _submitted(sweep_dir: Path) -> list[tuple[str, Path, str]]:
    """When each array was submitted, its directory and its id in Slurm; the oldest first."""
    submitted = []
    for directory in arrays(sweep_dir):
        try:
            content = json.loads((directory / "submitted.json").read_text(encoding="utf-8"))
            submitted.append((str(content["time"]), directory, str(content["job_id"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being submitted just now, or damaged
    return sorted(submitted)


def _of_queued(element: client.Element, job: _Job) -> Told:
    if element.state == "PENDING":
        return Told("launch failed" in element.reason, f"job {element.id} waits: {words(element.reason)}", None)
    return Told(False, f"job {element.id} is {element.state.lower()} and does not train this run now", job.log())


def _of_gone(job: _Job, end: client.End | None, begun: bool) -> Told | None:
    """`begun`: whether the run has trained; then its own record says more, unless the whole job was killed."""
    log = job.log()
    if begun:
        killed = end is not None and end.state in ("OUT_OF_MEMORY", "NODE_FAIL", "TIMEOUT", "DEADLINE")
        return Told(False, f"job {job.id} ended as {end.state}: {words(end.reason)}", log) if end and killed else None
    if end is not None and end.state == "CANCELLED":
        why = ": the job that makes its activations failed" if end.reason.startswith("Dependency") else ""
        return Told(False, f"job {job.id} was cancelled before it trained this run{why}", log)
    why = "" if end is None else f": {words(end.reason)}, exit code {end.exit_code}"
    if log is not None:
        return Told(True, f"job {job.id} ended before its work began{why}: {last_line(log) or 'no output'}", log)
    if end is not None:
        return Told(True, f"job {job.id} never began{why}", None)
    return Told(False, f"job {job.id} left the queue before it began; the same launch submits it again", None)


def words(reason: str) -> str:
    """Slurm's reason with ours behind it, if we know it."""
    name = reason.strip("()").split(",")[0]  # some reasons go on with the nodes that they mean
    return f"{WAITS[name]} ({name})" if name in WAITS else name
