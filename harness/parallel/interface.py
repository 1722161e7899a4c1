"""The few collectives a training step needs. Implementations know nothing of SAEs.

A mesh is `dp` replicas × `shard` ranks: the ranks of one replica see the same tokens and share its latents.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

GATHER_BYTES = 2**26

Axis = Literal["shard", "dp", "all"]

Kind = Literal["selection", "reconstruction", "auxk", "gradients", "counters", "mutual", "scalars", "evaluation"]
"""The purpose of an exchange; bytes are counted by it."""


@runtime_checkable
class Shards(Protocol):
    """This rank's place in the mesh, and the exchanges over it."""

    rank: int
    """Among all processes; rank 0 writes the record."""
    size: int
    """dp·shard."""
    dp_rank: int
    dp: int
    shard_rank: int
    shard: int

    def rows(self, count: int) -> slice:
        """Which of `count` rows (latents, or experts) this rank owns; `count` is divisible by `shard`."""
        ...

    def keep(self, values: Float[Tensor, "tokens width"], k: int, kind: Kind) -> Int[Tensor, " tokens"]:
        """How many of its descending candidates each token keeps, so that over all shards exactly the k largest
        are kept; equal values are kept on the lowest shard first."""
        ...

    def sum_(self, tensor: Tensor, over: Axis, kind: Kind) -> Tensor:
        """Sum in place over an axis of the mesh; returns `tensor`."""
        ...

    def global_view(self, local: Tensor, cut: bool) -> Tensor:
        """The tensor as a checkpoint sees it: `local` itself in one process, else a DTensor over the same memory.
        `cut`: `local` is this rank's rows of a larger tensor."""
        ...

    def gather(self, local: Tensor) -> Tensor:
        """All rows of a tensor that is cut over `shard`, on every rank, in the memory of the host. The device never
        holds more than `GATHER_BYTES` of them."""
        ...

    def texts(self, own: str) -> list[str]:
        """The texts of all ranks, in the order of ranks, on every rank."""
        ...

    def take_sent(self) -> dict[Kind, float]:
        """Bytes this rank sent since the last call, by kind, as an ideal network would carry them."""
        ...

    def started(self) -> None:
        """To be called after the first step: from now on a rank that is silent for minutes counts as lost."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def agree(self, bits: int) -> int:
        """Bitwise OR over all ranks of a number from 0 to 255. A mesh of several ranks returns the answer to the
        previous call."""
        ...
