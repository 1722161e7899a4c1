"""TopK and Switch: the k largest latents of a token, among all or among those of its expert. Multi-TopK."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from harness.ops import Codes, Nesting
from harness.ops.subset import selects_subsets
from harness.parallel import Kind, Shards
from harness.saes.entries import Backward, Batch, Entries
from harness.saes.sae import Params, Sae
from harness.saes.start import Start

MULTI_WEIGHT = 1 / 8
"""Of the error with 4k latents: L(k) + L(4k)/8 (Gao et al. 2024, section 5.3)."""


def active(sae: Sae, codes: Codes, k: int, shards: Shards, kind: Kind) -> Float[Tensor, "own k"]:
    """ReLU, and 0 for candidates that are not among the k largest over all shards."""
    values = codes.values.relu()
    if not sae.routed:
        kept = shards.keep(codes.values, k, kind)
        place = torch.arange(values.shape[1], device=values.device)
        values = values * (place < kept[:, None])
    return values


class TopK:
    """z = ReLU of the k largest pre-activations (Gao et al. 2024, section 2.3)."""

    def parameters(self, start: Start) -> Params:
        return {}

    def select(self, batch: Batch) -> Entries:
        return self._largest(batch, batch.sae.k)

    def _largest(self, batch: Batch, k: int) -> Entries:
        W_enc, bias = batch.compute["W_enc"], batch.params.get("b_enc")
        inputs, groups, dead, aux = batch.inputs, batch.routing.groups, batch.dead, None
        if dead is None:
            codes = batch.ops.select(inputs, W_enc, bias, k, groups)
        else:
            both = selects_subsets(batch.ops, inputs.dtype)
            assert both is not None
            codes, aux = both.select_with_subset(inputs, W_enc, bias, k, groups, dead.rows, dead.k)
        return Entries(codes.values, codes.index, active(batch.sae, codes, k, batch.shards, "selection"), dead=aux)

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        return Backward(dz)


class MultiTopK(TopK):
    """TopK whose loss also has the error with 4k latents, so that it reconstructs well with other k too."""

    def select(self, batch: Batch) -> Entries:
        sae, shards = batch.sae, batch.shards
        if not batch.training:
            return super().select(batch)
        entries = self._largest(batch, min(sae.passes * sae.k, sae.n_latents))
        # of this shard's descending candidates, those among the k largest over all shards
        kept = shards.keep(entries.pre, sae.k, "selection")
        first = torch.arange(entries.pre.shape[1], device=kept.device) < kept[:, None]
        nesting = Nesting((~first).to(torch.uint8), (1.0, MULTI_WEIGHT), headline=0)
        return replace(entries, nesting=nesting)
