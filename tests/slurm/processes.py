"""The processes of a scratch cluster: found by a mark in their environment, ended for certain.

Process ids in files could belong to someone else by the time they are read; the environment cannot.
"""

from __future__ import annotations

import os
import signal
import sys
import time
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
    conf = f"SLURM_CONF={directory}/slurm.conf"
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            entries = path.read_bytes().decode(errors="replace").split("\0")
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue  # ended meanwhile, or someone else's
        if role is None:
            ours = any(entry.startswith(f"{MARK}={directory}:") for entry in entries)
            in_job = conf in entries and any(entry.startswith("SLURM_JOB_ID=") for entry in entries)
        else:
            ours = f"{MARK}={directory}:{role}" in entries
            in_job = conf in entries and f"SLURMD_NODENAME={role}" in entries
        if ours or in_job:
            found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


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
