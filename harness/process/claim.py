"""Claims: two processes never do the same piece of work at once.

A claim is a small file that names its owner (host, process id and start time, job). The owner renews its modification
time as a heartbeat. A dead owner on the same host is recognised at once, one on another host when its heartbeat has
stopped. Ages are measured by the clock of the file system, so hosts need not agree on the time.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from harness.errors import UserError
from harness.process.signals import Interrupted, StopFlag
from harness.process.slurm_task import slurm_task
from harness.schema import TEXT, fields, number, optional, read_json, whole

HEARTBEAT_S = 10.0
STALE_S = 120.0
POLL_S = 0.5
_START_TOLERANCE_S = 2.0
"""Between two readings of the start time of one process, where the system counts no ticks."""


class Owner(NamedTuple):
    """Who holds a claim."""

    host: str
    machine: str
    """Boot id and process-id namespace, if the system tells: inside one, a process id can be looked up."""
    pid: int
    started: float
    """Start time of the process in seconds since 1970, for people."""
    token: str
    """Distinguishes two claims of one process."""
    job: str = ""
    """Job of a batch system, as its commands name it; empty outside one."""
    ticks: int | None = None
    """Clock ticks from the start of the machine to that of the process, on Linux: a process id alone may have been
    reused, and a time of day moves when somebody sets the clock."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")


_OWNER = fields(
    {"host": TEXT, "machine": TEXT, "pid": whole(1), "started": number(), "token": TEXT, "job?": TEXT}
    | {"ticks?": optional(whole())}
)


class Claimed(OSError):
    """Somebody else holds the claim."""

    def __init__(self, path: Path, owner: Owner | None) -> None:
        super().__init__(f"{path} is being worked on by {owner or 'another process'}")
        self.path, self.owner = path, owner


class Claim:
    """A claim that is held.

    If another process takes it over, `lost` turns true and the renewing thread calls `on_lost` with the path: this
    process must then leave the work alone.
    """

    def __init__(self, path: Path, owner: Owner, on_lost: Callable[[Path], None] | None = None) -> None:
        self._path, self._owner, self._on_lost = path, owner, on_lost
        self._end = threading.Event()
        self.lost = False
        self._thread = threading.Thread(target=self._renew, name=f"claim {path.name}", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._end.set()
        self._thread.join()
        if read_owner(self._path) == self._owner:
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._end.wait(HEARTBEAT_S):
            try:
                if read_owner(self._path) != self._owner:
                    self.lost = True
                    if self._on_lost is not None:
                        self._on_lost(self._path)
                    return
                os.utime(self._path)
            except OSError:
                continue  # a file system that does not answer now may answer at the next beat


@contextmanager
def claim(
    path: Path,
    *,
    wait: bool = False,
    stop: StopFlag | None = None,
    on_wait: Callable[[Owner | None], None] | None = None,
    on_lost: Callable[[Path], None] | None = None,
) -> Iterator[Claim]:
    """Hold the claim file `path` (its directory must exist) for the duration of the block.

    If a live process holds it, raises `Claimed`. With `wait` it calls `on_wait` once instead, and waits until the
    owner releases the claim or dies; it raises `Interrupted` when `stop` is requested meanwhile. A death is noticed at
    once on the same host, and after `STALE_S` seconds from another.
    """
    owner = _this_process()
    announced = False
    while not _try(path, owner):
        holder = read_owner(path)
        if not wait:
            raise Claimed(path, holder)
        if not announced and on_wait is not None:
            on_wait(holder)
        announced = True
        if stop is not None and stop.requested:
            raise Interrupted
        time.sleep(POLL_S)
    held = Claim(path, owner, on_lost)
    try:
        yield held
    finally:
        held.release()


def holder(path: Path) -> Owner | None:
    """The live owner of a claim; None when nobody holds it, its owner is dead, or we may not read it.

    For those who only look: nothing is written. So the age of a claim of another host is measured by our own clock.
    """
    try:
        owner = read_owner(path)
    except PermissionError:
        return None
    return None if owner is None or _is_dead(path, only_look=True) else owner


def _try(path: Path, owner: Owner) -> bool:
    if _create(path, owner):
        return True
    if not _is_dead(path):
        return False
    # If several processes see the dead claim, the one that creates this file replaces it; the others look again.
    takeover = path.with_name(f"{path.name}.takeover")
    if not _create(takeover, owner):
        if _is_dead(takeover):
            takeover.unlink(missing_ok=True)
        return False
    try:
        if not _is_dead(path):  # replaced between the two looks
            return False
        beside = path.with_name(f"{path.name}.{owner.token}")
        beside.write_text(json.dumps(owner._asdict()))
        beside.replace(path)
        return True
    finally:
        takeover.unlink(missing_ok=True)


def _create(path: Path, owner: Owner) -> bool:
    try:
        with path.open("x") as file:
            file.write(json.dumps(owner._asdict()))
    except FileExistsError:
        return False
    return True


def read_owner(path: Path) -> Owner | None:
    """The owner; None when there is no claim, or when it is partly written, damaged or none of ours."""
    try:
        return Owner(**read_json(path, _OWNER, ""))
    except (FileNotFoundError, UserError, TypeError):
        return None


def _is_dead(path: Path, *, only_look: bool = False) -> bool:
    owner = read_owner(path)
    if owner is not None and is_here(owner):
        return not _runs(owner)
    now = time.time() if only_look else _now(path)
    return abs(_age(path, now)) > STALE_S  # renewed in the future: before the clock was set back, and not since


def is_here(owner: Owner) -> bool:
    """Whether the owner's process id means a process that this one can look up: not in another container."""
    return owner.host == socket.gethostname() and owner.machine == _machine()


def _runs(owner: Owner) -> bool:
    try:
        process = psutil.Process(owner.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if owner.ticks is not None and (ticks := _ticks(owner.pid)) is not None:
            return ticks == owner.ticks
        return abs(process.create_time() - owner.started) < _START_TOLERANCE_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None where the system does not tell (proc(5))."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(line.rpartition(")")[2].split()[19])  # the 22nd field; the second is a name, in brackets


def _now(path: Path) -> float:
    """The time by the clock of the file system of `path`; by ours if we cannot write there."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}.clock")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def _age(path: Path, now: float) -> float:
    """Seconds since the claim was renewed."""
    try:
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # released meanwhile: the next attempt creates it


def _this_process() -> Owner:
    process = psutil.Process()
    token, task = uuid.uuid4().hex, slurm_task()
    return Owner(
        host=socket.gethostname(),
        machine=_machine(),
        pid=process.pid,
        started=process.create_time(),
        token=token,
        job="" if task is None else task.name,
        ticks=_ticks(process.pid),
    )


def _machine() -> str:
    parts = []
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():
        parts.append(boot.read_text().strip())
    namespace = Path("/proc/self/ns/pid")
    if namespace.is_symlink():
        parts.append(str(namespace.readlink()))
    return " ".join(parts)
