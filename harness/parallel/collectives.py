"""The collectives of torch.distributed that a mesh uses, with their types."""

# torch leaves parameters of these functions without types, so the type checker knows each call below only in part.
from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.distributed_c10d import (
    ProcessGroup,
    _set_pg_timeout,  # pyright: ignore[reportPrivateUsage]  (there is no public way to change a timeout)
)

Group = ProcessGroup | None
"""None is all ranks."""


def all_reduce(tensor: Tensor, group: Group = None) -> None:
    """Sum over the group, in place; `tensor` is contiguous."""
    dist.all_reduce(tensor, group=group)  # pyright: ignore[reportUnknownMemberType]


def start_maximum(tensor: Int[Tensor, " flags"], group: Group) -> dist.Work:
    """Begin the elementwise maximum over the group, in place; the result is there after `wait`."""
    work = dist.all_reduce(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        tensor, op=dist.ReduceOp.MAX, group=group, async_op=True
    )
    assert isinstance(work, dist.Work)
    return work


def all_to_all(received: Tensor, sent: Tensor, group: Group = None) -> None:
    """Send the i-th part of `sent` to rank i, and write what rank i sent to the i-th part of `received`."""
    dist.all_to_all_single(received, sent, group=group)  # pyright: ignore[reportUnknownMemberType]


def all_gather(parts: list[Tensor], tensor: Tensor, group: Group) -> None:
    """Write every rank's `tensor` to `parts`, in the order of ranks."""
    dist.all_gather(parts, tensor, group=group)  # pyright: ignore[reportUnknownMemberType]


def gather_texts(text: str, group: Group) -> list[str]:
    """Every rank's `text`, in the order of ranks."""
    texts = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)  # pyright: ignore[reportUnknownMemberType]
    return texts


def barrier(group: Group = None) -> None:
    """Return when every rank of the group is here."""
    dist.barrier(group=group)  # pyright: ignore[reportUnknownMemberType]


def new_control_group(timeout: timedelta) -> ProcessGroup:
    """A gloo group of all ranks, for flags on the CPU."""
    group = dist.new_group(backend="gloo", timeout=timeout)  # pyright: ignore[reportUnknownMemberType]
    assert isinstance(group, ProcessGroup)
    return group


def set_timeout(timeout: timedelta, group: Group) -> None:
    """From now on an exchange in this group fails after `timeout`."""
    _set_pg_timeout(timeout, group)
