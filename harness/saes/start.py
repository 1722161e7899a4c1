"""What an architecture knows when it sets its own initial values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from harness.parallel import Shards
from harness.parallel.kth import kth_largest, number_of
from harness.saes.sae import Params, Sae

THRESHOLD_ROWS, SMALLEST_THRESHOLD = 64, 1e-6
"""Rows that set a first threshold, and the least it can be."""


@dataclass(frozen=True)
class Start:
    sae: Sae
    params: Params
    """Those that all architectures have, on their device and in their precision."""
    sample: Float[Tensor, "sample d"]
    """Normalised rows in float64, on the CPU."""
    directions: Float[Tensor, "latents d"]
    """The random unit rows that the decoder began with, of this rank's latents."""
    shards: Shards

    def threshold(self) -> float:
        """What a pre-activation must exceed so that `target_l0` latents of a token are active, on average."""
        sae, params = self.sae, self.params
        rows = self.sample[:THRESHOLD_ROWS]
        inputs = (rows - params["b_dec"].to(rows) if sae.traits.pre_bias else rows).to(params["W_enc"])
        values = (inputs @ params["W_enc"].T).relu().flatten()
        wanted = max(1, min(round(sae.target_l0 * rows.shape[0]), sae.n_latents * rows.shape[0]))
        # the ranks of a replica hold different latents, replicas hold the same
        bits, _, _ = kth_largest(values, wanted * self.shards.dp, self.shards, "selection")
        return max(float(number_of(bits, values.dtype)), SMALLEST_THRESHOLD)

    def biases(self) -> Tensor:
        """Encoder biases with which L0 begins at its target; zero, as published, where the coefficient is fixed: it
        takes a penalty thousands of steps to bring L0 down from n/2, and it must be far too strong for that."""
        return torch.full_like(self.params["b_enc"], -self.threshold() if self.sae.target_l0 else 0.0)
