"""Times exchanges between the ranks, for the cost model of the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

from harness.parallel import collectives

Exchange = Literal["all_reduce", "all_to_all"]
IN_A_ROW = 10


def exchange_seconds(kind: Exchange, count: int, device: torch.device, rounds: int) -> list[float]:
    """Seconds that an exchange of `count` float32 numbers over all ranks takes, measured `rounds` times, each the mean
    of ten in a row. Every rank of a mesh of several ranks calls it. The number of ranks divides `count`."""
    given, taken = torch.zeros(count, device=device), torch.empty(count, device=device)

    def exchange() -> None:
        if kind == "all_reduce":
            collectives.all_reduce(given)
        else:
            collectives.all_to_all(taken, given)

    exchange()
    return [_timed(exchange, device) for _ in range(rounds)]


def _timed(work: Callable[[], None], device: torch.device) -> float:
    collectives.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(IN_A_ROW):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / IN_A_ROW
