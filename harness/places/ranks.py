"""Start several ranks on this machine, watch them, and end them together."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from harness.config import Config
from harness.errors import INTERRUPTED
from harness.files import last_line, open_own
from harness.process.signals import Interrupted, StopFlag
from harness.progress import RELAY_FD, Progress, relay
from harness.terminal import say

POLL_S = 0.1
PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when its parent ends."""
GRACE_S = 20.0
"""How long the other ranks have to notice by themselves that one has failed, and all to save when asked twice."""


class RankFailed(RuntimeError):
    """A rank ended before the training did."""

    def __init__(self, why: str, log: Path, line: str) -> None:
        super().__init__(f"{why}; its log is {log}: {line or 'it is empty'}")
        self.short = f"{why}: {line}" if line else why
        """Without the path of the log."""


def train_on_ranks(
    home: Path, config: Config, attempt_dir: Path, stop: StopFlag, progress: Progress, arguments: Sequence[str] = ()
) -> None:
    """Train the job in `home`, whose claims the caller holds, by `mesh.ranks` processes: `python -m harness.train home`
    with `arguments`.

    The output of rank r goes to `attempt_dir/rank<r>.log`; what rank 0 reports of its progress is shown on `progress`.
    A stop is passed on as SIGTERM, and `Interrupted` is raised when the ranks have saved. A second request kills ranks
    that have not saved `GRACE_S` seconds later. If a rank dies, the others are ended and `RankFailed` names the rank
    and its log.
    """
    world = config.mesh.ranks
    environment = rank_environment(world)
    logs = [attempt_dir / f"rank{rank}.log" for rank in range(world)]
    with ExitStack() as stack:
        ranks = []
        reports = stack.enter_context(relay(progress))
        for rank, log in enumerate(logs):
            output = stack.enter_context(open_own(log, "wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.train", "--claimed", *arguments, str(home)],
                env=environment
                | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                | ({RELAY_FD: str(reports)} if rank == 0 else {}),
                pass_fds=(reports,) if rank == 0 else (),
                stdin=subprocess.PIPE,  # never written to: see `end_with_starter`
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches this process only, which passes it on once
            )
            ranks.append(process)
        try:
            _watch(ranks, logs, stop)
        finally:
            end_ranks(ranks)


def rank_environment(world: int) -> dict[str, str]:
    """Environment of the ranks of one group on this machine, still without RANK and LOCAL_RANK."""
    environment = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    # otherwise every rank would start a thread per core, and they would wait for each other
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    return environment


def end_with_starter() -> None:
    """In a rank: exit at once when the process that started it has ended; standard input ends then.

    The starter of a training holds the claims; without them somebody else may train the runs. On Linux the system
    kills the rank, also one that is suspended.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_leave_at_end_of_input, name="starter", daemon=True).start()


def _leave_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        continue
    os._exit(INTERRUPTED)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _watch(ranks: list[subprocess.Popen[bytes]], logs: list[Path], stop: StopFlag) -> None:
    stopping, patience_ends = False, math.inf
    while True:
        codes = [process.poll() for process in ranks]
        if stopping and -signal.SIGTERM in codes:  # that rank did not listen yet, so it had nothing to save
            _wait(ranks, GRACE_S)
            raise Interrupted
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, INTERRUPTED)]
        if failed:
            _wait(ranks, GRACE_S)
            # a killed rank is the cause; the others failed because they lost it
            rank = min(failed, key=lambda r: (codes[r] or 0) > 0)
            raise RankFailed(f"rank {rank} {_ending(codes[rank])}", logs[rank], last_line(logs[rank]))
        if None not in codes:
            if INTERRUPTED in codes:
                raise Interrupted
            return
        if stop.requested and not stopping:
            for process in ranks:
                process.send_signal(signal.SIGTERM)
            stopping = True
        if stop.urgent and patience_ends == math.inf:
            say(f"asked twice: ranks that have not saved in {GRACE_S:.0f} s will be killed")
            patience_ends = time.monotonic() + GRACE_S
        if time.monotonic() > patience_ends:
            late = [str(rank) for rank, code in enumerate(codes) if code is None]
            say(f"killed the ranks that did not answer: {', '.join(late)}; what was saved before stays")
            raise Interrupted
        time.sleep(POLL_S)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)


def end_ranks(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Kill the ranks that still run. Each has a pipe as its standard input."""
    for process in ranks:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
