"""The side of the training program: announce runs to the mirror process, and wait for it at the end."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from harness.config import Config
from harness.mirror.copies import TITLES
from harness.terminal import say

CLOSE_TIMEOUT_S = 15.0
"""How long the end of the program waits for the mirror to copy the rest."""


class Mirror:
    """The mirror process of this program.

    Runs are announced in an unnamed temporary file, which the process reads as its standard input. Unlike a pipe, a
    file takes every line at once, even while the process hangs or after it died.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        with contextlib.ExitStack() as on_error:
            self._runs = on_error.enter_context(tempfile.TemporaryFile(buffering=0))
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.mirror", str(os.getpid())],
                stdin=self._runs,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the training; the mirror ends when this process does
            )
            on_error.pop_all()

    def write(self, line: str) -> None:
        """Announce a run (a JSON string) or, with an empty line, the end. Returns at once."""
        self._runs.write(f"{line}\n".encode())

    def close(self, timeout_s: float) -> None:
        """Wait until the process has copied everything, but no longer than `timeout_s`; then kill it."""
        problem = "ended early"
        try:
            self.write("")
            self.process.wait(timeout_s)
        except (OSError, subprocess.TimeoutExpired):
            problem = f"did not finish within {timeout_s:.0f} s"
            kill_tree(self.process.pid)
        self._runs.close()
        if self.process.wait() != 0:
            warn(
                f"{self._title} {problem}; the runs are not affected, their own records are complete. "
                "Send one later: python -m harness.replay RUN_DIR"
            )


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants; W&B's service is one, in a session of its own."""
    process = psutil.Process(pid)
    for each in [*process.children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def warn(line: str) -> None:
    say(f"warning: {line}")


_mirror: Mirror | None = None


def follow(run_dir: Path, config: Config) -> None:
    """Copy the record in `run_dir` to the tracker of `config` from now until its `result.json` appears.

    `run_dir` must hold the frozen `config.yaml`, and `metrics.jsonl` must already be cut back to where the run resumes.
    The first call starts the mirror process. Never blocks, and never raises because of the tracker.
    """
    global _mirror
    tracker = config.tracker.name
    if tracker == "none" or (tracker == "wandb" and os.environ.get("WANDB_MODE") == "disabled"):
        return
    try:
        if _mirror is None:
            _mirror = Mirror(TITLES[tracker])
            atexit.register(close)
        _mirror.write(json.dumps(str(run_dir.resolve())))
    except OSError as error:
        warn(f"{TITLES[tracker]} cannot be started ({error.strerror}); the runs are not affected")


def close(timeout_s: float = CLOSE_TIMEOUT_S) -> None:
    """Wait until the mirror has copied everything, but no longer than `timeout_s`; called at the end of the program."""
    global _mirror
    mirror, _mirror = _mirror, None
    if mirror is not None:
        mirror.close(timeout_s)
