"""Several ranks on one machine: started, watched, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from harness.config import Config
from harness.errors import INTERRUPTED
from harness.files import last_line
from harness.process.signals import Interrupted, StopFlag

POLL_S = 0.1
GRACE_S = 20.0
"""After one rank has ended badly, the others get this long to notice by themselves."""


class RankFailed(RuntimeError):
    """A rank ended before the run did."""


def train_on_ranks(home: Path, config: Config, attempt_dir: Path, stop: StopFlag) -> None:
    """Train the job in `home`, whose claims the caller holds, by dp·shard processes (`python -m harness.train home`).

    Rank 0 shows its progress here; every rank's output is in `attempt_dir/rank<r>.log`. A stop is passed on as SIGTERM,
    and `Interrupted` is raised when the ranks have saved. Raises `RankFailed`, naming the rank and its log, when one
    dies; the others are ended first.
    """
    world = config.mesh.ranks
    environment = rank_environment(world)
    logs = [attempt_dir / f"rank{rank}.log" for rank in range(world)]
    with ExitStack() as stack:
        ranks = []
        for rank, log in enumerate(logs):
            output = stack.enter_context(log.open("wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "harness.train", "--claimed", str(home)],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,  # never written to: see `end_with_starter`
                stdout=output,
                stderr=None if rank == 0 and sys.stderr.isatty() else output,
                start_new_session=True,  # Ctrl-C reaches this process only, which passes it on once
            )
            ranks.append(process)
        try:
            _watch(ranks, logs, stop)
        finally:
            _end(ranks)


def rank_environment(world: int) -> dict[str, str]:
    """Environment of the ranks of one group on this machine, still without RANK and LOCAL_RANK."""
    environment = os.environ | {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    # without a share for each, every rank would start a thread per core and they would wait for each other
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // world)))
    return environment


def end_with_starter() -> None:
    """In a rank that `train_on_ranks` started: leave at once when that process is gone, however it ended. It holds the
    claims, and what is no longer claimed may be trained by somebody else. Its end is the end of standard input."""
    threading.Thread(target=_leave_at_end_of_input, name="starter", daemon=True).start()


def _leave_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1):
        continue
    os._exit(INTERRUPTED)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _watch(ranks: list[subprocess.Popen[bytes]], logs: list[Path], stop: StopFlag) -> None:
    told = False
    while True:
        codes = [process.poll() for process in ranks]
        if told and -signal.SIGTERM in codes:  # it had not begun to listen, so it had nothing to save
            _wait(ranks, GRACE_S)
            raise Interrupted
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0, INTERRUPTED)]
        if failed:
            _wait(ranks, GRACE_S)
            # the one that ended first is the cause; a killed one explains those that lost their peer
            rank = min(failed, key=lambda r: (codes[r] or 0) > 0)
            raise RankFailed(
                f"rank {rank} {_ending(codes[rank])}; its log is {logs[rank]}: {last_line(logs[rank]) or 'it is empty'}"
            )
        if None not in codes:
            if INTERRUPTED in codes:
                raise Interrupted
            return
        if stop.requested and not told:
            for process in ranks:
                process.send_signal(signal.SIGTERM)
            told = True
        time.sleep(POLL_S)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        time.sleep(POLL_S)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
