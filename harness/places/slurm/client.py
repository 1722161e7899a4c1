"""Slurm's commands as functions. Each has a timeout, and its errors are one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from harness.errors import UserError
from harness.places.slurm.environment import job_environment

TIMEOUT_S = 60.0
RETRY_S = 2.0
ABSENT = "it is not on this machine; run this on a login node of the cluster, or use cluster=local"


@dataclass(frozen=True)
class Element:
    """An element of an array that is queued or running."""

    id: str
    """`17_3`: what `scancel` and `scontrol` take."""
    name: str
    index: int
    state: str
    """As Slurm says it: PENDING, RUNNING, COMPLETING …"""
    reason: str
    """Why it waits, in Slurm's word; `None` if it does not."""


class SlurmError(RuntimeError):
    """Slurm refused or did not answer; the text is its message, in one line."""


def call(*command: str, timeout_s: float = TIMEOUT_S) -> str:
    """The standard output of a Slurm command, which gets a cleaned environment. Raises `UserError` without Slurm, and
    `SlurmError` when it fails."""
    if shutil.which(command[0]) is None:
        raise UserError(f"cannot call {command[0]}: {ABSENT}")
    try:
        done = subprocess.run(
            command,
            env=job_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer within {timeout_s:.0f} s") from None
    if done.returncode:
        raise SlurmError(_said(done.stderr) or f"{command[0]} ended with exit code {done.returncode}")
    return done.stdout


def _said(stderr: str) -> str:
    """Slurm's message without the name of the command before every line."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(lines)


def elements(names: Sequence[str], timeout_s: float = TIMEOUT_S) -> list[Element]:
    """The elements of these arrays that are queued or running."""
    if not names:
        return []
    queued = []
    listed = call("squeue", "--noheader", "--array", "--me", "--format=%i|%K|%T|%r|%j", timeout_s=timeout_s)
    for line in listed.splitlines():
        identity, index, state, reason, name = line.strip().split("|", 4)  # the name may have any character
        if name in names:
            queued.append(Element(identity, name, int(index) if index.isdigit() else 0, state, reason))
    return queued


def submit(script: str, *flags: str) -> str:
    """Submit a job script, return the job's id."""
    # a federated cluster appends its name
    return call("sbatch", "--parsable", *flags, script).strip().split(";")[0]


def max_array_size() -> int:
    """Elements that one array may have here."""
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config"), re.MULTILINE)
    return int(size[1]) if size else 1001


@dataclass(frozen=True)
class JobState:
    state: str
    """As Slurm says it: RUNNING, COMPLETING, CANCELLED …"""
    ends: float | None
    """When Slurm will end the job, in seconds since 1970; None when Slurm does not say."""
    preempted: bool
    """Whether a preemption has begun."""
    restarts: int
    """How often Slurm has requeued the job, a requeue that is under way included."""


def state(job_id: str) -> JobState:
    """What Slurm knows of a job."""
    text = call("scontrol", "show", "job", "--oneliner", job_id)
    job_state = re.search(r"\bJobState=(\w+)", text)
    end = re.search(r"\bEndTime=(\S+)", text)
    preemption = re.search(r"\bPreemptTime=(\S+)", text)
    restarts = re.search(r"\bRestarts=(\d+)", text)
    try:
        ends = time.mktime(time.strptime(end[1], "%Y-%m-%dT%H:%M:%S")) if end else None
    except ValueError:
        ends = None  # "Unknown": a partition without limits
    return JobState(
        state=job_state[1] if job_state else "UNKNOWN",
        ends=ends,
        preempted=preemption is not None and preemption[1] not in ("None", "Unknown"),
        restarts=int(restarts[1]) if restarts else 0,
    )


@dataclass(frozen=True)
class End:
    """How a job ended."""

    state: str
    """As Slurm says it: FAILED, CANCELLED, OUT_OF_MEMORY …"""
    reason: str
    exit_code: str
    """Of the script, and the signal that ended it: `0:53`."""


def ends(array_id: str, timeout_s: float = TIMEOUT_S) -> dict[int, End]:
    """Index → end of the elements of an array that have ended, as far as Slurm remembers: the controller does for some
    minutes, its data base (if the site has one) for long."""
    found: dict[int, End] = {}
    try:
        for line in call("scontrol", "show", "job", "--oneliner", array_id, timeout_s=timeout_s).splitlines():
            # elements that ended before they began share a line: `0-4,7`
            indices = re.search(r" ArrayTaskId=([\d,-]+)", line)
            end = re.search(r" UserId=.* JobState=(\w+) Reason=(.*?) Dependency=.* ExitCode=(\d+:\d+) ", line)
            if indices is None or end is None:
                continue
            for first, last in re.findall(r"(\d+)(?:-(\d+))?", indices[1]):
                found |= {index: End(end[1], end[2], end[3]) for index in range(int(first), int(last or first) + 1)}
    except SlurmError:
        fields = "--format=JobID,State,Reason,ExitCode"
        with suppress(SlurmError, UserError):
            for line in call("sacct", "-XnP", f"--jobs={array_id}", fields, timeout_s=timeout_s).splitlines():
                identity, state, reason, exit_code = line.split("|")
                index = identity.rpartition("_")[2]
                if index.isdecimal():
                    found[int(index)] = End(state.split()[0], reason, exit_code)
    return found


def insist(*command: str, attempts: int = 60) -> str:
    """Repeat `call` while the controller does not answer: it may be restarting."""
    for attempt in range(attempts):
        try:
            return call(*command)
        except SlurmError as error:
            message = str(error)
            silent = "Unable to contact" in message or "no answer" in message or "Unexpected message" in message
            if not silent or attempt == attempts - 1:
                raise
            time.sleep(RETRY_S)
    raise AssertionError("the last attempt returns or raises")
