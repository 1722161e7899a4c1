"""The processes of a scratch cluster: found by a mark in their environment, ended for certain.

Process ids in files could belong to someone else by the time they are read; the environment cannot.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "SCRATCH_SLURM"
"""In the environment of every daemon, `<directory>:<role>`; slurmstepd inherits it from its slurmd. Jobs do not, they
get the environment of who submitted them and are known by SLURM_CONF and SLURM_JOB_ID."""

TERM_WAIT_S = 3.0


def mark(directory: Path, role: str) -> dict[str, str]:
    """What a daemon's environment must hold to be found again."""
    return {MARK: f"{directory}:{role}"}


def members(directory: Path, role: str | None = None) -> list[int]:
    """Ids of the live processes of one daemon (a slurmd's include the jobs on its node), or of the whole cluster."""
    found = []
    for pid, environment in _environments():
        marked = environment.get(MARK, "")
        in_job = environment.get("SLURM_CONF") == f"{directory}/slurm.conf" and "SLURM_JOB_ID" in environment
        if role is None:
            ours = marked.startswith(f"{directory}:") or in_job
        else:
            ours = marked == f"{directory}:{role}" or (in_job and environment.get("SLURMD_NODENAME") == role)
        if ours:
            found.append(pid)
    return found


def ranks(conf: Path, job_id: str) -> dict[int, int]:
    """Rank → id of the process that a slurmstepd started, for the steps of one job or of one element of an array."""
    found = {}
    for pid, environment in _environments():
        get = environment.get
        names = (get("SLURM_JOB_ID"), f"{get('SLURM_ARRAY_JOB_ID')}_{get('SLURM_ARRAY_TASK_ID')}")
        # the batch script has a rank too, but no step
        if get("SLURM_CONF") == str(conf) and job_id in names and "SLURM_STEP_ID" in environment:
            found[pid] = int(environment["SLURM_PROCID"])
    return {rank: pid for pid, rank in found.items() if _parent(pid) not in found}


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        try:
            entries = path.read_bytes().decode(errors="replace").split("\0")
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue  # ended meanwhile, or someone else's
        if pid != os.getpid():
            yield pid, {name: value for name, _, value in (entry.partition("=") for entry in entries)}


def _parent(pid: int) -> int | None:
    try:
        # the name before it, in parentheses, may hold anything
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (ProcessLookupError, FileNotFoundError):
        return None


def end(directory: Path, role: str | None = None, wait_s: float = TERM_WAIT_S) -> None:
    """SIGTERM, after `wait_s` seconds SIGKILL, until none is left."""
    deadline = time.monotonic() + wait_s
    asked: set[int] = set()
    while alive := members(directory, role):
        late = time.monotonic() > deadline
        for pid in alive:
            if late or pid not in asked:
                _signal(pid, signal.SIGKILL if late else signal.SIGTERM)
        asked.update(alive)
        time.sleep(0.05)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    # the guard of `cluster.running`: stdin ends with the process that started the cluster, however it ends
    sys.stdin.buffer.read()
    end(Path(sys.argv[1]))
