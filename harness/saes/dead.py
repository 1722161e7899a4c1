"""Which latents are dead, for AuxK."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.ops import Ops
from harness.ops.subset import selects_subsets
from harness.ops.untyped import integers
from harness.parallel import Shards
from harness.saes.sae import Sae

MOST_FILLED = 2
"""Lists of all groups are made equally long unless that makes them so many times as long together: one expert may have
nearly all dead latents, and the others would compute for nothing."""


@dataclass(frozen=True)
class DeadLatents:
    """The latents AuxK may use, renewed every few steps."""

    rows: Int[Tensor, " listed"]
    """Local rows: of each group the dead ones, ascending, then others if the list is filled up."""
    row_offsets: tuple[int, ...]
    """Where the list of each local group begins in `rows`."""
    k: int
    """min(configured k_aux, length of a group's list; for a sharded TopK dead latents of all shards)."""
    total: int
    """Dead latents on all shards."""
    barred: Float[Tensor, " listed"] | None = None
    """−inf for rows that only fill up a list, else 0: added to pre-activations. None: lists are as long as they are."""

    def renewed(self, found: DeadLatents) -> DeadLatents:
        """`found`, whose lists are as long, in the memory of these lists: a CUDA graph may read them from there."""
        assert self.barred is not None and found.barred is not None
        self.rows.copy_(found.rows)
        self.barred.copy_(found.barred)
        return replace(found, rows=self.rows, barred=self.barred)


def encoded_with_all(sae: Sae, dtype: torch.dtype, shards: Shards, ops: Ops) -> bool:
    """Whether AuxK takes its pre-activations from the encoder's product in this precision, so that dead latents are not
    encoded again. Experts and shards choose among dead latents of their own, and BatchTopK selects by a threshold."""
    alone = sae.traits.per_token and not sae.routed and shards.shard == 1
    return alone and selects_subsets(ops, dtype) is not None


def find_dead(sae: Sae, dead: Bool[Tensor, " rows"], shards: Shards, ops: Ops) -> DeadLatents | None:
    """The dead local latents by group; None if no shard has any, or if AuxK is off.

    Waits for the device, so it is called only every few steps.
    """
    if sae.aux_alpha == 0:
        return None
    by_group = dead.view(-1, sae.latents_per_expert if sae.routed else dead.shape[0])
    per_group = by_group.sum(dim=1)
    # a token of TopK selects among the dead latents of all shards, a token of Switch among those of its expert
    total = shards.sum_(per_group.sum(), "shard", "scalars")
    *counts, everywhere = integers(torch.cat([per_group, total[None]]))
    if not everywhere:
        return None
    groups, width = by_group.shape
    length = min(width, ops.list_length(max(counts)))
    least = ops.list_length(1)  # 1: these kernels want no list filled up
    if least > 1 and length * groups <= MOST_FILLED * sum(counts) + least * groups:
        # stable, so that dead latents come first, each kind in order
        place = by_group.logical_not().byte().argsort(dim=1, stable=True)[:, :length]
        rows = (place + torch.arange(groups, device=place.device)[:, None] * width).flatten()
        barred = torch.where(by_group.gather(1, place), 0.0, -torch.inf).flatten()
        lengths = [length] * groups
    else:
        rows, barred, lengths = dead.nonzero().squeeze(1), None, counts
    most = max(lengths) if sae.routed or shards.shard == 1 else everywhere
    offsets = (0, *itertools.accumulate(lengths))
    return DeadLatents(rows, offsets, max(1, min(sae.aux_k, most)), everywhere, barred)
