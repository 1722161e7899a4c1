"""`python -m harness.mirror PARENT_PID < RUNS`: copy the records of the runs that a training program announces.

RUNS is a file that grows: a JSON string with a run directory per line; an empty line says that no run follows. The
process ends when all copies are closed. It also ends after its parent does, however that ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from harness.mirror import copies, messages
from harness.mirror.follow import kill_tree
from harness.record import names
from harness.record.result import read_result
from harness.record.rundir import read_config

POLL_S = 0.5
"""Between looks at the files of a run, and at the list of runs."""

DRAIN_LIMIT_S = 60.0
"""How long this process may outlive the training."""


class Follower(threading.Thread):
    """Copies one run. Every run has a thread, so that one that hangs does not hold up the others."""

    def __init__(self, run_dir: Path, training_over: threading.Event) -> None:
        super().__init__(name=f"mirror {run_dir.name}")
        self._run_dir, self._training_over = run_dir, training_over

    def run(self) -> None:
        title = "The mirror"
        try:
            config = read_config(self._run_dir)
            title = copies.TITLES[config.tracker.name]
            self._copy(copies.open_copy(self._run_dir, config, live=True))
        except Exception as error:  # which ones, the tracker's package decides
            text = f"{title} failed for {self._run_dir.name}, its own record is complete: {messages.in_one_line(error)}"
            messages.say_once(f"{title} failed", f"warning: {text}")

    def _copy(self, copy: copies.Copy) -> None:
        tail = copies.Tail(self._run_dir / names.METRICS)
        while True:
            # both are looked at before the lines, so that the last lines are not missed
            over = self._training_over.is_set()
            result = read_result(self._run_dir)
            copies.send(copy, tail.read())
            if result is not None or over:
                copies.finish(copy, result or {"status": "interrupted"})
                return
            self._training_over.wait(POLL_S)


def main() -> int:
    parent = int(sys.argv[1])
    # a cancelled job gets these in all its processes; training saves then, and this process copies that
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    over = threading.Event()
    followers: dict[bytes, Follower] = {}
    position, ended = 0, False
    while not ended:
        ended = os.getppid() != parent
        written = os.pread(sys.stdin.fileno(), os.fstat(sys.stdin.fileno()).st_size, position)
        *runs, _ = written.split(b"\n")  # what follows the last newline is still being written
        position += sum(len(run) + 1 for run in runs)
        for run in runs:
            ended |= run == b""
            # a run that goes on in the same program goes on in its open copy
            if run and not (run in followers and followers[run].is_alive()):
                followers[run] = Follower(Path(json.loads(run)), over)
                followers[run].start()
        over.wait(0 if ended else POLL_S)
    over.set()
    limit = threading.Timer(DRAIN_LIMIT_S, kill_tree, [os.getpid()])
    limit.daemon = True
    limit.start()
    for follower in followers.values():
        follower.join()
    # all copies are closed; wandb's cleanup at exit raises if a signal has ended its own process
    sys.unraisablehook = lambda _: None
    return 0


if __name__ == "__main__":
    sys.exit(main())
