"""Two selections from one product: among all latents, and among some of them alone."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops.interface import Codes, Groups, Ops


@runtime_checkable
class SelectsSubsets(Protocol):
    """A kernel set that makes both selections from one product, in float32 or bfloat16."""

    def select_with_subset(
        self,
        x: Float[Tensor, "tokens d"],
        W_enc: Float[Tensor, "rows d"],
        b_enc: Float[Tensor, " rows"] | None,
        k: int,
        groups: Groups,
        subset: Int[Tensor, " subset"],
        subset_k: int,
    ) -> tuple[Codes, Codes]:
        """`Ops.select` of the only group, of at least k rows; and the `subset_k` largest among the rows `subset`
        (ascending, at least so many), as with `ordered=False`, where `index` counts places in `subset`."""
        ...


def selects_subsets(ops: Ops, dtype: torch.dtype) -> SelectsSubsets | None:
    """The kernel set, if it does so for products in this precision."""
    able = isinstance(ops, SelectsSubsets) and dtype is not torch.float64
    return cast(SelectsSubsets, ops) if able else None
