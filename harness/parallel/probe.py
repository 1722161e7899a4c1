"""How fast this machine's ranks exchange: what a cost model needs to know about the network."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist

Exchange = Literal["all_reduce", "all_to_all"]
IN_A_ROW = 10


def exchange_seconds(kind: Exchange, count: int, device: torch.device, rounds: int) -> list[float]:
    """Seconds of an exchange of `count` float32 numbers over all ranks, `rounds` times the mean of ten in a row; called
    by every rank of a mesh of several. `count` is divisible by the number of ranks."""
    given, taken = torch.zeros(count, device=device), torch.empty(count, device=device)

    def exchange() -> None:
        if kind == "all_reduce":
            dist.all_reduce(given)
        else:
            dist.all_to_all_single(taken, given)

    exchange()
    return [_timed(exchange, device) for _ in range(rounds)]


def _timed(work: Callable[[], None], device: torch.device) -> float:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(IN_A_ROW):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / IN_A_ROW
