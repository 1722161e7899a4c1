"""JumpReLU: a threshold per latent that is learned through a kernel around it.

`JumpRelu` has the penalty λ·L0 (Rajamanoharan et al. 2024, arXiv 2407.14435). `JumpReluTanh` has the penalty
λ·Σ tanh(4·z·‖d‖), a further one on pre-activations below the threshold, and gradients that also pass through the jump
to the encoder (Conerly et al. 2025). θ is learned as log θ. K(u) = 1 for |u| < 1/2; it sees *pre*-activations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from harness.budget import BIAS_ROWS
from harness.ops import Codes, per_entry
from harness.ops.untyped import norm
from harness.saes.entries import Backward, Batch, Entries
from harness.saes.sae import Params
from harness.saes.start import Start

TANH_SCALE = 4.0
"""c in tanh(c·z·‖d‖)."""


class JumpRelu:
    """z = a·H(a − θ). ∂z/∂θ = −(θ/ε)·K((a − θ)/ε) and ∂H/∂θ = −K((a − θ)/ε)/ε (equations 11 and 12)."""

    def parameters(self, start: Start) -> Params:
        """`log_threshold`; with a `threshold_init` of 0 such that L0 begins at its target."""
        first = start.sae.threshold_init or start.threshold()
        return {"log_threshold": torch.full_like(start.params["b_enc"], math.log(first))}

    def select(self, batch: Batch) -> Entries:
        params = batch.params
        threshold = params["log_threshold"].exp()
        # entries inside the kernel teach the threshold even where they are not active
        least = threshold - batch.sae.bandwidth / 2 if batch.training else threshold
        codes = batch.ops.select_above(
            batch.inputs, batch.compute["W_enc"], params["b_enc"], least, batch.routing.groups
        )
        return Entries(
            codes.values, codes.index, codes.values.where(~(codes.values <= per_entry(threshold, codes.index)), 0.0)
        )

    def _near(self, batch: Batch, entries: Entries, theta: Tensor) -> Tensor:
        """K((a − θ)/ε). `theta`: of each entry's latent."""
        return ((entries.pre - theta).abs_() < batch.sae.bandwidth / 2).to(entries.z.dtype)

    def _all_grads(self, batch: Batch, entries: Entries, dz: Tensor, near: Tensor) -> Tensor:
        """`dz`, and the same for entries inside the kernel that are not active; as a new tensor."""
        inside = Codes(near.where(entries.z == 0, 0.0), entries.index)
        residual = batch.residual
        assert residual is not None
        grads = batch.ops.latent_grads(inside, batch.compute["W_dec"], residual, batch.routing.groups)
        return grads.mul_(batch.factor).add_(dz)

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        epsilon, rows = batch.sae.bandwidth, batch.params["b_enc"].shape[0]
        threshold = batch.params["log_threshold"].exp()
        theta = per_entry(threshold, entries.index)
        near = self._near(batch, entries, theta)
        pull = self._all_grads(batch, entries, dz, near).mul_(theta).add_(sparsity)
        to_threshold = batch.ops.latent_sums(pull.mul_(near), entries.index, rows) / -epsilon
        return Backward(
            dz, {"log_threshold": threshold * to_threshold}, latent_loss=sparsity * (entries.z > 0).to(dz.dtype).sum()
        )


class JumpReluTanh(JumpRelu):
    def parameters(self, start: Start) -> Params:
        """Decoder uniform in ±1/√d, encoder (d/n)·W_dec, biases such that every latent fires on 10,000/n of the sample
        (Conerly et al. 2025)."""
        sae, params = start.sae, start.params
        # normal numbers made uniform, so that each shard draws only its own rows
        W_dec = torch.erf(start.directions * math.sqrt(sae.d_model / 2)) / math.sqrt(sae.d_model)
        W_enc, b_enc = W_dec * (sae.d_model / sae.n_latents), torch.zeros_like(params["b_enc"])
        log_threshold = super().parameters(start)["log_threshold"]
        sample, threshold = start.sample.to(W_enc), log_threshold.exp()
        least = max(1, round(min(0.5, sae.traits.first_active / sae.n_latents) * sample.shape[0]))
        for first in range(0, W_enc.shape[0], BIAS_ROWS):
            block = slice(first, first + BIAS_ROWS)
            products = sample @ W_enc[block].T
            b_enc[block] = threshold[block] - products.topk(least, dim=0).values[-1]
        return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "log_threshold": log_threshold}

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        sae, params, index, z = batch.sae, batch.params, entries.index, entries.z
        rows, tokens, sums = params["b_enc"].shape[0], batch.inputs.shape[0], batch.ops.latent_sums
        threshold = params["log_threshold"].exp()
        theta = per_entry(threshold, index)
        near = self._near(batch, entries, theta)
        norms = norm(params["W_dec"], dim=1)
        reach = torch.tanh(TANH_SCALE * z * per_entry(norms, index))
        slope = sparsity * TANH_SCALE * (1 - reach.square())
        active = (z > 0).to(z.dtype)
        g = self._all_grads(batch, entries, dz, near) + slope * per_entry(norms, index) * (active + near).clamp(max=1)
        jump = theta / sae.bandwidth * near
        # ReLU(θ − a)·‖d‖ on every token: on all of them, less the active ones
        below = sae.preactivation_penalty / batch.global_tokens * norms
        da = g * (active + jump) + per_entry(below, index) * active
        excess = sums((entries.pre - theta).where(z > 0, 0.0), index, rows)
        total = batch.inputs.to(params["W_enc"].dtype).sum(dim=0)
        everywhere = tokens * (threshold - params["b_enc"]) - params["W_enc"] @ total
        shortfall = excess + everywhere
        silent = tokens - sums(active, index, rows)
        to_threshold = below * silent - sums(g * jump, index, rows)
        return Backward(
            da,
            {"log_threshold": threshold * to_threshold},
            latent_loss=sparsity * reach.sum() + (below * shortfall).sum(),
            decoder_norm=sums(slope * z, index, rows) + below / norms * shortfall,
            everywhere=-below,
        )
