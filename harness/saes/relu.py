"""SAEs that choose by sign: ReLU with an ℓ1 penalty, ReLU with a free decoder, and ProLU."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.ops import per_entry
from harness.ops.untyped import norm
from harness.saes.entries import Backward, Batch, Entries
from harness.saes.sae import Params
from harness.saes.start import Start


class Relu:
    """z = ReLU(a), penalty λ·Σ z, unit decoder rows (Bricken et al. 2023)."""

    def parameters(self, start: Start) -> Params:
        return {"b_enc": start.biases()}

    def select(self, batch: Batch) -> Entries:
        params = batch.params
        zero = params["b_enc"].new_zeros(params["b_enc"].shape)
        codes = batch.ops.select_above(
            batch.inputs, batch.compute["W_enc"], params["b_enc"], zero, batch.routing.groups
        )
        z = codes.values.relu_()  # in place: at the start of training most latents are active
        return Entries(z, codes.index, z)

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        # `dz` is 0 where z is
        return Backward(dz.add_(sparsity).mul_(entries.z > 0), latent_loss=sparsity * entries.z.sum())


class ReluDecoderNorm(Relu):
    """z = ReLU(a), penalty λ·Σ z·‖d‖, free decoder, no bias before the encoder (Conerly et al. 2024)."""

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        norms = norm(batch.params["W_dec"], dim=1)
        z, own = entries.z, per_entry(norms, entries.index)
        return Backward(
            dz + sparsity * own * (z > 0),
            latent_loss=sparsity * (z * own).sum(),
            decoder_norm=sparsity * batch.ops.latent_sums(z, entries.index, norms.shape[0]),
        )


class ProLu:
    """z = m·1[m > 0 and m + b > 0], m = W·x without bias (Taggart 2024), penalty λ·Σ z.

    The derivative in the bias is a convention. `relu`: that of ReLU(m + b) for both m and b. `ste`: the
    straight-through estimator, dm = (1 + m)·dz and db = m·dz.

    Biases begin at zero, as published, also where L0 has a target: without a penalty L0 falls by itself, so one that
    began at its target would end below it, whatever the penalty.
    """

    def parameters(self, start: Start) -> Params:
        return {"b_enc": torch.zeros_like(start.params["b_enc"])}

    def select(self, batch: Batch) -> Entries:
        bias = batch.params["b_enc"]
        codes = batch.ops.select_above(
            batch.inputs, batch.compute["W_enc"], None, (-bias).clamp(min=0), batch.routing.groups
        )
        m, own = codes.values, per_entry(bias, codes.index)
        # NaN is kept, so that it reaches the loss
        return Entries(m, codes.index, torch.where((m <= 0) | (m + own <= 0), 0.0, m))

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        z, rows = entries.z, batch.params["b_enc"].shape[0]
        g = dz + sparsity * (z > 0).to(z.dtype)
        dm, db = (g, g) if batch.sae.prolu == "relu" else (g * (1 + z), g * z)
        own = {"b_enc": batch.ops.latent_sums(db, entries.index, rows)}
        return Backward(dm, own, latent_loss=sparsity * z.sum())
