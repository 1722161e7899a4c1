"""How a run is asked to stop: a signal sets a flag, and the loop reads it between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

REASONS = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "asked to stop (SIGTERM)",
    signal.SIGUSR1: "asked to stop (SIGUSR1)",
    signal.SIGHUP: "the terminal was closed (SIGHUP)",
}
"""What sets a `StopFlag` → why, in the words of the record."""

STOP, SAVE = 1, 2
"""Bits that ranks agree on: a rank was asked to stop; it is time to save."""


class Interrupted(Exception):
    """The work stopped on request, at a point from which it can be resumed."""


def interrupt_on_signals() -> None:
    """From now on SIGINT and SIGTERM raise `KeyboardInterrupt`, also where a shell started the command with SIGINT
    ignored, as it does in the background."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


DEADLINE_MARGIN_S = 20.0
"""Seconds to keep free before a time limit, in addition to the time of a save."""


class StopFlag:
    """Set once, by a signal handler, another thread or a deadline; never cleared. The same signal again: urgent.

    `deadline` is when the process will be killed, in seconds since 1970; `lead_s` is how long before it to begin to
    save, or 0 for twice the time of a save.
    """

    def __init__(self, deadline: float | None = None, lead_s: float = 0.0) -> None:
        self._event = threading.Event()
        self._deadline, self._lead_s = deadline, lead_s
        self.after_steps = 0
        """Set the flag once this many steps are done; 0: never."""
        self.reason = ""
        """Why the flag was set, in a few words."""
        self.urgent = False
        """Whether somebody has asked again: who does not answer need not be waited for much longer."""

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self, reason: str = "") -> None:
        self.reason = self.reason or reason
        self._event.set()

    def look_at_deadline(self, save_s: float) -> None:
        """Set the flag if the time left only suffices for a save of `save_s` seconds."""
        lead = self._lead_s or 2 * save_s + DEADLINE_MARGIN_S
        if self._deadline is not None and time.time() > self._deadline - lead:
            self.request("time limit")

    def look_at_step(self, done: int) -> None:
        """Set the flag if no more than the `done` steps were asked for."""
        if self.after_steps and done >= self.after_steps:
            self.request(f"asked to stop after {self.after_steps} steps")


@contextmanager
def stop_on_signals(deadline: float | None = None, lead_s: float = 0.0) -> Iterator[StopFlag]:
    """Turn SIGINT, SIGTERM, SIGUSR1 and SIGHUP into a `StopFlag` for the duration of the block.

    A second SIGINT exits at once: files on disk are whole at every moment, so nothing saved is lost. SIGHUP stays
    ignored where it was, as under nohup.
    """
    flag = StopFlag(deadline, lead_s)
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    seen: set[int] = set()

    def on_signal(number: int, _frame: object) -> None:
        if number == signal.SIGINT and flag.requested:
            os.write(2, b"\nleft at once; what was saved stays, and the same command goes on from there\n")
            os._exit(128 + signal.SIGINT)
        if number == signal.SIGHUP:
            _write_to_nowhere(terminals)
        flag.urgent = flag.urgent or number in seen
        seen.add(number)
        flag.request(REASONS[signal.Signals(number)])

    watched = [number for number in REASONS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _write_to_nowhere(descriptors: list[int]) -> None:
    """A terminal that was closed refuses every line, and no line is worth an error in the middle of a save."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
