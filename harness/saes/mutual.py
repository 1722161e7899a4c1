"""Mutual feature regularisation (arXiv 2411.01220): SAEs of the same rows are drawn to each other's features.

The penalty of an SAE with decoder rows d_i is the mean over its peers of 1 − MMCS, MMCS = mean_i max_j cos(d_i, e_j),
where e_j are the peer's rows, which get no gradient. A feature that several SAEs find is more likely one of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from harness.budget import MATCHED_ROWS
from harness.ops.untyped import norm
from harness.parallel import Shards

SMALLEST_NORM = 1e-12
"""A row of a free decoder that is shorter counts as this long."""


class Peers(NamedTuple):
    """What draws an SAE in one step."""

    decoders: Sequence[Float[Tensor, "rows d"]]
    """This rank's rows of W_dec of each peer."""
    weight: float
    """λ·w(t), in units of the loss."""


def draw_to_peers(
    W_dec: Float[Tensor, "rows d"], peers: Peers, shards: Shards, grad: Float[Tensor, "rows d"]
) -> Float[Tensor, ""]:
    """Add the gradient of the weighted penalty to `grad`; returns the penalty without its weight, over all latents.

    The gradient of −cos(d, e) with respect to d is −(e/‖e‖ − cos·d/‖d‖)/‖d‖, for the e with the largest cosine alone.
    Each replica does its own share of the rows, so the sum of `grad` over replicas is the gradient.
    """
    rows = W_dec.shape[0]
    each = -(-rows // shards.dp)
    own = slice(min(rows, shards.dp_rank * each), min(rows, (shards.dp_rank + 1) * each))
    length = norm(W_dec[own], dim=1, keepdim=True).clamp_min(SMALLEST_NORM)
    unit = W_dec[own] / length
    pull, cosines = torch.zeros_like(unit), unit.new_zeros(unit.shape[0])
    for decoder in peers.decoders:
        cosine, matched = nearest(unit, decoder, shards)
        cosines += cosine
        pull += matched
    pairs = rows * shards.shard * len(peers.decoders)
    grad[own].addcdiv_(pull.addcmul_(unit, cosines[:, None], value=-1), length, value=-peers.weight / pairs)
    return 1 - shards.sum_(cosines.sum(), "all", "scalars") / pairs


def nearest(
    unit: Float[Tensor, "own d"], decoder: Float[Tensor, "rows d"], shards: Shards
) -> tuple[Float[Tensor, " own"], Float[Tensor, "own d"]]:
    """(largest cosine of each of `unit`'s rows, which have norm 1, with a row of the whole `decoder`; that row, with
    norm 1).

    Exact. `decoder` is cut over shards: all ranks see one block of it after the other, and no rank holds more cosines
    than those of two blocks. It does not wait for the device.
    """
    best, matched = unit.new_full((unit.shape[0],), -torch.inf), torch.zeros_like(unit)
    for owner in range(shards.shard):
        for begin in range(0, decoder.shape[0], MATCHED_ROWS):
            part = decoder[begin : begin + MATCHED_ROWS]
            block = normalize(part, dim=1, eps=SMALLEST_NORM) if owner == shards.shard_rank else torch.zeros_like(part)
            block = shards.sum_(block, "shard", "mutual")
            for first in range(0, unit.shape[0], MATCHED_ROWS):
                span = slice(first, first + MATCHED_ROWS)
                cosine, place = (unit[span] @ block.T).max(dim=1)
                nearer = cosine > best[span]
                best[span] = torch.where(nearer, cosine, best[span])
                matched[span] = torch.where(nearer[:, None], block[place], matched[span])
    return best, matched
