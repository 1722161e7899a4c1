"""Garbage collection at fixed points of a loop."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected_by_request() -> Iterator[None]:
    """Inside, Python collects garbage only when `gc.collect()` is called, and not what existed before.

    An automatic collection starts at another step on every rank, and each time all ranks wait for one.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
