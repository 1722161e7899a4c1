"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one path decides what is active, another how strongly."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.ops import Codes, per_entry
from harness.saes.entries import Backward, Batch, Entries
from harness.saes.sae import Params
from harness.saes.start import Start


class Gated:
    """π = W(x − b_dec) + b_enc is the gate; z = 1[π > 0]·ReLU(e^r ⊙ W(x − b_dec) + b_mag).

    Loss: error(z) + λ·Σ ReLU(π) + error(ReLU(π)) with decoder and b_dec detached (equation 8).
    """

    def parameters(self, start: Start) -> Params:
        """`r_mag` zero, `b_mag` as the bias of the gate: at first both paths are the same."""
        biases = start.biases()
        return {"b_enc": biases, "r_mag": torch.zeros_like(biases), "b_mag": biases.clone()}

    def select(self, batch: Batch) -> Entries:
        params = batch.params
        zero = params["b_enc"].new_zeros(params["b_enc"].shape)
        codes = batch.ops.select_above(
            batch.inputs, batch.compute["W_enc"], params["b_enc"], zero, batch.routing.groups
        )
        magnitude = self._products(batch, codes) * per_entry(params["r_mag"].exp(), codes.index)
        magnitude = magnitude + per_entry(params["b_mag"], codes.index)
        return Entries(codes.values, codes.index, torch.where(codes.values <= 0, 0.0, magnitude).relu())

    def _products(self, batch: Batch, codes: Codes) -> Tensor:
        """W(x − b_dec) of each entry; 0 where padded."""
        return (codes.values - per_entry(batch.params["b_enc"], codes.index)).where(~codes.values.isneginf(), 0.0)

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        params, index = batch.params, entries.index
        gate = entries.pre.relu()
        # the decoder does not learn from this reconstruction, so only its gradient with respect to the gate counts
        _, d_gate, squared = batch.ops.reconstruct(
            Codes(gate, index), batch.compute["W_dec"], batch.target, None, batch.routing.groups, batch.reduce
        )
        d_gate = batch.factor * d_gate + sparsity * (gate > 0).to(gate.dtype)
        scale = per_entry(params["r_mag"].exp(), index)
        scaled = self._products(batch, Codes(entries.pre, index)) * scale
        sums = batch.ops.latent_sums
        rows = params["b_enc"].shape[0]
        own = {
            "b_enc": sums(d_gate, index, rows),
            "b_mag": sums(dz, index, rows),
            "r_mag": sums(dz * scaled, index, rows),
        }
        error = squared.sum() / (batch.sae.variance * batch.global_tokens)
        return Backward(dz * scale + d_gate, own, token_loss=error, latent_loss=sparsity * gate.sum())
