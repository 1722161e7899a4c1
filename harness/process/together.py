"""If one rank raises, all raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.parallel import Shards
from harness.process.signals import Interrupted


@contextmanager
def together(shards: Shards) -> Iterator[None]:
    """Run a block on every rank; all ranks meet at its end.

    Raises what the block raised on this rank. If it raised nothing here but something on another rank, raises
    `Interrupted` if that was `Interrupted`, else `OSError`.
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
