"""Slurm's commands as functions. Each has a timeout, and its errors are one line."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from harness.errors import UserError

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


class SlurmError(RuntimeError):
    """Slurm refused or did not answer; the text is its message, in one line."""


def call(*command: str) -> str:
    """The standard output of a Slurm command. Raises `UserError` without Slurm, and `SlurmError` when it fails."""
    if shutil.which(command[0]) is None:
        raise UserError(f"cannot call {command[0]}: {ABSENT}")
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} gave no answer within {TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise SlurmError(_said(done.stderr) or f"{command[0]} ended with exit code {done.returncode}")
    return done.stdout


def _said(stderr: str) -> str:
    """Slurm's message without the name of the command before every line."""
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line.strip()) for line in stderr.splitlines() if line.strip()]
    return "; ".join(lines)


def elements(names: Sequence[str]) -> list[Element]:
    """The elements of these arrays that are queued or running."""
    if not names:
        return []
    queued = []
    for line in call("squeue", "--noheader", "--array", "--me", "--format=%i|%j|%K|%T").splitlines():
        identity, name, index, state = line.strip().split("|")
        if name in names:
            queued.append(Element(identity, name, int(index) if index.isdigit() else 0, state))
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
