"""One process: the null object of the mesh."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from harness.parallel.interface import Axis, Kind


class Solo:
    """A mesh of one rank: it owns every row, keeps its own top k, and sums over nobody."""

    rank = 0
    size = 1
    dp_rank = 0
    dp = 1
    shard_rank = 0
    shard = 1

    def rows(self, count: int) -> slice:
        return slice(0, count)

    def keep(self, values: Float[Tensor, "tokens width"], k: int, kind: Kind) -> Int[Tensor, " tokens"]:
        tokens, width = values.shape
        return values.new_full((tokens,), min(k, width)).long()

    def sum_(self, tensor: Tensor, over: Axis, kind: Kind) -> Tensor:
        return tensor

    def global_view(self, local: Tensor, cut: bool) -> Tensor:
        return local

    def gather(self, local: Tensor) -> Tensor:
        return local.cpu()

    def texts(self, own: str) -> list[str]:
        return [own]

    def take_sent(self) -> dict[Kind, float]:
        return {}

    def started(self) -> None:
        pass

    def barrier(self) -> None:
        pass

    def agree(self, bits: int) -> int:
        return bits
