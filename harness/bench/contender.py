"""Contenders as processes: start, ask, stop."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

from harness.errors import UserError


class Process:
    """A contender that runs in its own interpreter. Use as a context manager.

    A contender ends when its input does, so none outlives the driver. Each has its own process group, so that Ctrl-C
    reaches only the driver, which ends them all.
    """

    def __init__(self, name: str, command: list[str], task: dict[str, Any]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        try:
            self._send(json.dumps(task))
        except BaseException:  # `__exit__` is not called then
            self._process.kill()
            raise

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UserError(f"{self.name} ended early; its output is above") from None

    def ask(self, *command: str | Path) -> dict[str, Any]:
        """Send one command and wait for its answer. Raises `UserError` if the process has died."""
        self._send(" ".join(str(part) for part in command))
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} ended early; its output is above")
        return json.loads(line)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self._process.kill()  # it may be in a long step, and it has nothing to save
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it may have ended already
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
