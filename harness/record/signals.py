"""Asking a run to stop: a flag that is set by a signal and looked at between steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED_EXIT_CODE = 75
"""EX_TEMPFAIL: stopped before the end, and the same command goes on where it stopped."""

STOP, SAVE = 1, 2
"""Bits that ranks agree on: somebody was asked to stop, it is time to save."""


class Interrupted(Exception):
    """The work was stopped on request, at a point from which it can be resumed."""


class StopFlag:
    """Set once, from a signal handler or another thread; never cleared."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into a `StopFlag` for the duration of the block.

    A second SIGINT leaves at once: everything on disk is whole at every moment, so nothing saved is lost.
    """
    flag = StopFlag()

    def on_signal(number: int, _frame: object) -> None:
        if number == signal.SIGINT and flag.requested:
            os._exit(128 + signal.SIGINT)
        flag.request()

    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    previous = {number: signal.signal(number, on_signal) for number in watched}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
