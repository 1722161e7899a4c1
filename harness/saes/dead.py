"""Which latents are dead, for AuxK."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from harness.ops import Ops
from harness.ops.subset import selects_subsets
from harness.ops.untyped import integers
from harness.parallel import Shards
from harness.saes.sae import Sae


@dataclass(frozen=True)
class DeadLatents:
    """The latents AuxK may use, renewed every few steps."""

    rows: Int[Tensor, " dead"]
    """Local rows, ascending."""
    row_offsets: tuple[int, ...]
    """Where each local group's dead latents begin in `rows`."""
    k: int
    """min(configured k_aux, number of dead latents in the largest group, over all shards for TopK)."""
    total: int
    """Dead latents on all shards."""


def encoded_with_all(sae: Sae, dtype: torch.dtype, shards: Shards, ops: Ops) -> bool:
    """Whether AuxK takes its pre-activations from the encoder's product in this precision, so that dead latents are not
    encoded again. Experts and shards choose among dead latents of their own, and BatchTopK selects by a threshold."""
    alone = sae.traits.per_token and not sae.routed and shards.shard == 1
    return alone and selects_subsets(ops, dtype) is not None


def find_dead(sae: Sae, dead: Bool[Tensor, " rows"], shards: Shards) -> DeadLatents | None:
    """The dead local latents by group; None if no shard has any, or if AuxK is off.

    Waits for the device, so it is called only every few steps.
    """
    if sae.aux_alpha == 0:
        return None
    per_group = dead.view(-1, sae.latents_per_expert if sae.routed else dead.shape[0]).sum(dim=1)
    # a token of TopK selects among the dead latents of all shards, a token of Switch among those of its expert
    total = shards.sum_(per_group.sum(), "shard", "scalars")
    available = per_group.max() if sae.routed else total
    *counts, most, everywhere = integers(torch.cat([per_group, available[None], total[None]]))
    if not everywhere:
        return None
    offsets = (0, *itertools.accumulate(counts))
    return DeadLatents(dead.nonzero().squeeze(1), offsets, max(1, min(sae.aux_k, most)), everywhere)
