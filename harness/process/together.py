"""Ranks that work side by side: if one raises, all raise; none waits in an exchange for hours of another's work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from harness.errors import UserError
from harness.parallel import Shards
from harness.process.signals import STOP, Interrupted, StopFlag

SIGN_OF_LIFE_S = 10.0
"""Between two exchanges of ranks that wait for one that works long."""

_REFUSED, _STOPPED, _FAILED = 1, 2, 3


@contextmanager
def together(shards: Shards, *, patient: bool = False) -> Iterator[None]:
    """Run a block on every rank; all ranks meet at its end, and raise alike.

    If the block raised on any rank, every rank raises: its own exception where that is of the gravest kind, else
    `OSError` for a failure elsewhere, else `Interrupted` for that, else the `UserError` of another rank. `patient`:
    the block may take hours on one rank, and exchanges nothing itself. The ranks then exchange signs of life meanwhile,
    so that no exchange runs into a timeout.
    """
    problem: Exception | None = None
    with _signs_of_life(shards, patient):
        try:
            yield
        except Exception as raised:
            problem = raised
    own = _gravity(problem)
    ranks = shards.sum_(torch.tensor([int(own == kind) for kind in range(4)]), "all", "scalars").tolist()
    gravest = max(kind for kind in range(4) if ranks[kind])
    reasons = shards.texts(str(problem or "")) if gravest == _REFUSED else []
    if problem is not None and own == gravest:
        raise problem
    if gravest == _FAILED:
        raise OSError("another rank has failed; its log says why") from problem
    if gravest == _STOPPED:
        raise Interrupted from problem
    if gravest == _REFUSED:
        raise UserError(next(filter(None, reasons)))


def _gravity(problem: Exception | None) -> int:
    if problem is None:
        return 0
    return _REFUSED if isinstance(problem, UserError) else _STOPPED if isinstance(problem, Interrupted) else _FAILED


@contextmanager
def _signs_of_life(shards: Shards, patient: bool) -> Iterator[None]:
    """Until every rank has left the block, all ranks exchange a number again and again, from a thread."""
    if not patient or shards.size == 1:
        yield
        return
    left, failures = threading.Event(), list[Exception]()

    def exchange() -> None:
        try:
            while True:
                left.wait(SIGN_OF_LIFE_S)
                if int(shards.sum_(torch.tensor(int(left.is_set())), "all", "scalars")) == shards.size:
                    return
        except Exception as lost:  # a rank has died: raised below, where the caller is
            failures.append(lost)

    thread = threading.Thread(target=exchange, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:  # this process ends now
        left.set()
        raise
    left.set()
    thread.join()
    if failures:
        raise failures[0]


def in_turns(count: int, work: Callable[[int], None], shards: Shards, stop: StopFlag) -> None:
    """Call `work` with each number below `count`, on one of the ranks: they take turns.

    Raises what `work` raises, and `Interrupted` between two calls when `stop` is set. If a rank stops or fails, the
    others learn it a call or two later and return early, so the caller has to join them (`together`).
    """
    problem: Exception | None = None
    # the same number of rounds on every rank, however much is left to do on each
    for first in range(0, count, shards.size):
        if shards.agree(STOP * (stop.requested or problem is not None)) & STOP:
            break
        if problem is not None or first + shards.rank >= count:
            continue
        try:
            work(first + shards.rank)
        except Exception as raised:
            problem = raised
    shards.agree(0)  # `agree` may answer a call late: what ended these rounds must not end those of the next work
    if problem is not None:
        raise problem
    if stop.requested:
        raise Interrupted
