"""The process beside the training that computes its windows, as the rank that started or joined it sees it."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from harness.activations.window import layout
from harness.activations.window.produce import ADMITTED
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.process.claim import claim, holder

ANSWER_S = 60.0
"""A process that does not answer for so long is not joined."""

_left_to_others: list[subprocess.Popen[bytes]] = []
"""Processes that this one has started and that compute on for other trainings."""


class OwnProcess:
    """Joins the process of another training of this machine that stands at the same place in the text, else starts one.

    That of a training that was killed is taken over with its windows. If the training that started the process ends and
    takes it along, as Slurm does, one of those that are left starts another in its place.
    """

    def __init__(self, directory: Path, cfg: ActivationsConfig, store: Path) -> None:
        """`directory`: where the windows of the store lie."""
        self._directory, self._slot, self._at = directory, -1, -1
        self._request = {"activations": dataclasses.asdict(cfg), "store": str(store.absolute())}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._changing = threading.Lock()

    def open(self, window: int) -> int:
        """Begin to read at `window`; returns the number of the slot."""
        self._directory.mkdir(exist_ok=True)
        self._at = window
        self._reach(range(layout.MOST_SLOTS))
        return self._slot

    def train_on(self, window: int) -> None:
        """Tell that `window` and the next one are needed, and none before."""
        if window != self._at:
            with self._changing, suppress(OSError):  # `check` finds out that the process is gone
                self._at = window
                assert self._connection is not None
                self._connection.sendall(b"%d\n" % window)

    def check(self) -> None:
        """See to it that windows come. Raises `OSError` if the process has ended and does not say why in the slot."""
        with self._changing:
            if self._connection is None or not _is_closed(self._connection) or self._failed.is_file():
                return
            self._connection.close()
            if self._process is not None:
                code = self._process.wait()
                raise OSError(f"the process that computes the windows ended with code {code}; the log says why")
            self._reach([self._slot])

    def close(self) -> None:
        if self._connection is None:
            return
        lock = layout.slot_lock(self._directory, self._slot)
        with claim(layout.slots_lock(self._directory), wait=True), self._connection:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_WR)
            if _answer(self._connection):
                _left_to_others.extend(filter(None, [self._process]))
                return
            if self._process is not None:
                self._process.wait()
            if holder(lock) is None:
                shutil.rmtree(layout.slot_path(self._directory, self._slot), ignore_errors=True)
                lock.unlink(missing_ok=True)

    @property
    def _failed(self) -> Path:
        return layout.slot_path(self._directory, self._slot) / layout.FAILED

    def _reach(self, slots: Iterable[int]) -> None:
        with claim(layout.slots_lock(self._directory), wait=True):
            free = None
            for slot in slots:
                if holder(layout.slot_lock(self._directory, slot)) is None:
                    free = slot if free is None else free
                elif self._joins(slot):
                    return
            if free is None:
                raise UserError(
                    f"{layout.MOST_SLOTS} trainings read windows in {self._directory}; wait for one, or pack the cells"
                )
            self._start(free)

    def _joins(self, slot: int) -> bool:
        path = layout.slot_path(self._directory, slot) / layout.ADDRESS
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(ANSWER_S)
            connection.connect(path.read_text(encoding="utf-8"))
            return self._is_admitted(connection, slot)
        except OSError:  # of another machine, or not there yet
            connection.close()
            return False

    def _start(self, slot: int) -> None:
        path = layout.slot_path(self._directory, slot)
        path.mkdir(exist_ok=True)
        for left in (layout.FAILED, layout.ADDRESS):
            (path / left).unlink(missing_ok=True)
        write_json_atomic(path / layout.REQUEST, self._request)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.activations.window.produce", str(path.absolute())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the training, which leaves when it has saved
            )
        if not self._is_admitted(ours, slot):
            ours.close()
            raise OSError(f"the process that computes the windows ended with code {self._process.wait()}")

    def _is_admitted(self, connection: socket.socket, slot: int) -> bool:
        connection.sendall(b"%d\n" % self._at)
        if _answer(connection) != ADMITTED:
            connection.close()
            return False
        connection.settimeout(None)
        self._connection, self._slot = connection, slot
        return True


def _answer(connection: socket.socket) -> bytes:
    """What the process says; nothing once it has ended."""
    with suppress(ConnectionResetError):
        return connection.recv(16)
    return b""


def _is_closed(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
