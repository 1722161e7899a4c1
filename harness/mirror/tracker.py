"""Mirrors of the record for people: Weights & Biases, or none.

The record itself is `metrics.jsonl` and `result.json`. W&B gets a copy through a process of its own
(`harness.mirror.wandb_mirror`): whatever it does - hang, crash, be slow - training cannot notice.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

from harness.config import Config

CLOSE_TIMEOUT_S = 15.0
"""How long the end of the program waits for W&B to take what is left."""

UNSENT_LIMIT_BYTES = 16 * 2**20
"""What may wait for the mirror process in memory."""


class Tracker(Protocol):
    """Where the lines of one run are mirrored to. No method raises or blocks because of the service behind it."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Mirror a line of `metrics.jsonl`; it has `step` and `tokens`."""
        ...

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """End the run with its final values; returns at once, sending goes on in the background."""
        ...


class NullTracker:
    """Mirrors nothing."""

    def log(self, line: Mapping[str, Any]) -> None:
        pass

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        pass


class WandbTracker:
    """One W&B run, fed through the mirror process."""

    def __init__(self, mirror: Mirror, run_dir: Path) -> None:
        self._mirror = mirror
        self._run = str(run_dir.resolve())
        mirror.send({"run": self._run, "do": "open"})

    def log(self, line: Mapping[str, Any]) -> None:
        self._mirror.send({"run": self._run, "do": "log", "line": dict(line)})

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        plain = {k: v for k, v in summary.items() if isinstance(v, str | int | float | bool) or v is None}
        self._mirror.send({"run": self._run, "do": "finish", "summary": plain, "exit_code": exit_code})


class Mirror:
    """The process that talks to W&B for all runs of this program; started with the first one."""

    def __init__(self) -> None:
        self._unsent = bytearray()
        environment = os.environ | {"WANDB_SILENT": "true"}
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "harness.mirror.wandb_mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the training; the mirror ends when its input does
        )
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Hand a message over without waiting; when the mirror takes nothing for long, give it up for good."""
        if self._process is None:
            return
        self._unsent += (json.dumps(message, default=str) + "\n").encode()
        self._write()
        if len(self._unsent) > UNSENT_LIMIT_BYTES:
            self._give_up("stopped taking data")

    def _write(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: os.write(self._pipe, self._unsent)]
        except BlockingIOError:
            return  # the pipe is full; the rest goes with the next message
        except BrokenPipeError:
            self._give_up("ended early")

    def close(self, timeout_s: float) -> None:
        """Wait for what is left to be sent, but no longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._unsent and self._process is not None and time.monotonic() < deadline:
            select.select([], [self._pipe], [], 0.1)
            self._write()
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
            self._process = None
        except subprocess.TimeoutExpired:
            self._give_up(f"did not finish within {timeout_s:.0f} s")

    def _give_up(self, reason: str) -> None:
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        print(
            f"warning: W&B {reason}; the runs are not affected, their own records are complete. "
            "Send one later: python -m harness.replay RUN_DIR",
            file=sys.stderr,
        )
        # its service process is a child in a session of its own
        for child in [*_children(process.pid), psutil.Process(process.pid)] if process.poll() is None else []:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        process.stdin.close()
        process.wait()


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


_mirror: Mirror | None = None


def open_tracker(config: Config, run_id: str, run_dir: Path, resumed: bool) -> Tracker:
    """The tracker that `config.tracker` names. `run_dir` must hold the frozen `config.yaml`.

    A resumed run goes on in the W&B run that its directory belongs to.
    """
    global _mirror
    if config.tracker.name == "none" or os.environ.get("WANDB_MODE") == "disabled":
        return NullTracker()
    if _mirror is None:
        try:
            _mirror = Mirror()
        except OSError as error:
            print(f"warning: W&B cannot be started ({error.strerror}); the runs are not affected", file=sys.stderr)
            return NullTracker()
        atexit.register(close_mirror)
    return WandbTracker(_mirror, run_dir)


def close_mirror(timeout_s: float = CLOSE_TIMEOUT_S) -> None:
    """Wait, for a limited time, until W&B has what was logged; called at the end of the program."""
    global _mirror
    if _mirror is not None:
        _mirror.close(timeout_s)
        _mirror = None
