"""What stops one rank stops all: none waits for one that has left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.parallel import Shards
from harness.process.signals import Interrupted


@contextmanager
def together(shards: Shards) -> Iterator[None]:
    """A piece of work, the same or not on every rank, at whose end all ranks meet.

    Raises what the block raised here. On the ranks where it raised nothing: `Interrupted` when it was interrupted on
    another one, `OSError` when something else went wrong there.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as raised:
        problem = raised
    interrupted = isinstance(problem, Interrupted)
    flags = torch.tensor([int(interrupted), int(problem is not None and not interrupted)])
    stopped, failed = shards.sum_(flags, "all", "scalars").tolist()
    if problem is not None:
        raise problem
    if failed:
        raise OSError("another rank has failed; its log says why")
    if stopped:
        raise Interrupted
