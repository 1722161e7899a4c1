"""Where the ranks of a group meet before `torch.distributed` starts.

Its own rendezvous blocks in C++ for half an hour: it says nothing and hears no signal. Here every rank looks again and
again, and the caller can speak and leave in between.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from harness.errors import UserError

LOOK_S = 0.2
CONNECT_S = 1.0

Waiting = Callable[[str], None]
"""Called again and again with what is being waited for, e.g. `1 of 2 ranks`. It may raise to end the waiting."""


def meet(rank: int, world: int, address: str, port: int, timeout: timedelta, on_wait: Waiting) -> Store:
    """The store of the group, when all `world` ranks have come to it. Rank 0 holds it at `address` and `port`.

    Raises `UserError` when the port is taken, or when ranks are missing after `timeout`.
    """
    end = time.monotonic() + timeout.total_seconds()

    def wait_for(what: str) -> None:
        if time.monotonic() > end:
            raise UserError(f"{what} did not come within {timeout}; were all ranks started?")
        on_wait(what)
        time.sleep(LOOK_S)

    if rank == 0:
        try:
            store = TCPStore(address, port, world, True, timeout, wait_for_workers=False)
        except RuntimeError as error:
            message = str(error).splitlines()[0]
            raise UserError(
                f"the ranks cannot meet at {address}:{port} (MASTER_ADDR, MASTER_PORT): {message}"
            ) from error
    else:
        while not _listens(address, port):
            wait_for(f"rank 0 at {address}:{port}")
        store = TCPStore(address, port, world, False, timeout, wait_for_workers=False)
    store.add("arrived", 1)
    while (missing := world - store.add("arrived", 0)) > 0:
        wait_for(f"{missing} of {world} ranks")
    return store


def _listens(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), CONNECT_S):
        return True
    return False


def meeting_point() -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT. Raises `UserError` when they are missing or no address."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"RANK and WORLD_SIZE are set, but MASTER_ADDR={address!r} and MASTER_PORT={port!r} name no place where "
            "ranks can meet; start them with torchrun or srun, or unset all four"
        )
    return address, int(port)
