"""`python -m harness.activations.window.produce SLOT`: compute windows for the trainings of a machine that read SLOT.

Standard input is a socket to the training that starts it; further ones connect to the address in SLOT. Each writes the
number of the window that it trains on, a line each time. The first line is answered: whether the windows that are kept
are those it needs. Of the windows at which the trainings stand the earliest and the next one are computed, so that
there are never more than two. When the last training has left, or was killed, this process ends at once.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from harness.activations.window import layout
from harness.activations.window.compute import Producer, Readers
from harness.errors import FAILED, UserError
from harness.files import write_text_atomic
from harness.process.claim import claim
from harness.process.device import pick_device
from harness.process.signals import StopFlag

ADMITTED, REFUSED, OTHERS = b"yes\n", b"no\n", b"others\n"
"""Answers to a training: to its first line, and when it leaves while others stay."""


def produce(slot: Path) -> None:
    """Compute what the trainings ask for, until the last has left."""
    outlives, meeting = threading.Lock(), Path(tempfile.mkdtemp(prefix="windows-"))

    def end() -> None:
        with outlives:
            shutil.rmtree(meeting, ignore_errors=True)
            os._exit(0)  # in the middle of a forward too

    readers = Readers(end)
    with claim(slot.with_suffix(".lock")):
        # without an address, where the path is too long for a socket, nobody joins
        with suppress(OSError), socket.socket(socket.AF_UNIX) as server:
            server.bind(str(meeting / "socket"))
            server.listen()
            write_text_atomic(slot / layout.ADDRESS, str(meeting / "socket"))
            _in_background(_accept, server.dup(), readers)
        _in_background(_talk, socket.socket(fileno=sys.stdin.fileno()), readers)
        Producer(slot, pick_device("auto"), StopFlag(), outlives=outlives).serve(readers)


def _in_background(work: object, *arguments: object) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()  # pyright: ignore[reportArgumentType]


def _accept(server: socket.socket, readers: Readers) -> None:
    while True:
        _in_background(_talk, server.accept()[0], readers)


def _talk(connection: socket.socket, readers: Readers) -> None:
    """Hear where a training stands, until it leaves."""
    reader, admitted = object(), False
    with suppress(OSError), connection:
        try:
            for line in connection.makefile("r"):
                if admitted:
                    readers.train_on(reader, int(line))
                else:
                    admitted = readers.admit(reader, int(line))
                    connection.sendall(ADMITTED if admitted else REFUSED)
        finally:
            readers.leave(reader)
        connection.sendall(OTHERS)


def main() -> int:
    slot = Path(sys.argv[1])
    try:
        produce(slot)
    except (UserError, OSError) as error:
        write_text_atomic(slot / layout.FAILED, str(error))
    return FAILED


if __name__ == "__main__":
    sys.exit(main())
