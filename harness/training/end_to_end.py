"""End-to-end objectives (Braun et al. 2024, arXiv 2405.12241, §3): what an SAE costs the language model, in the loop.

e2e: L = KL(clean‖spliced), nats per row that is replaced. e2e_downstream: L = KL/2 + 2.5·mean over later blocks of
‖h − ĥ‖²/V, V the variance of the clean values after that block. Neither has a local error. The published coefficients
(½ and 2.5) belong to errors that are averaged over d in the model's own units; here an error is in units of fvu, as
everywhere, so they are those of a stream with a variance of 1 per channel. AuxK and penalties are added as always.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from harness.activations.source import ActivationSource
from harness.activations.store.paths import store_path
from harness.activations.whole_contexts import ContextBatch, Weights, WholeContexts
from harness.config import Config
from harness.saes import Normalizer
from harness.saes.step import Pull

WEIGHTS = {"e2e": Weights(1.0, 0.0), "e2e_downstream": Weights(0.5, 2.5)}
SUMS = ("kl", "later_fvu")
"""Means in the record: KL per row, and the error of later blocks (0 without a weight)."""


def whole_contexts(config: Config, source: ActivationSource, device: torch.device) -> WholeContexts:
    """The batches of these objectives; `source`: the store of the same text. Raises `UserError`."""
    file = store_path(config.activations, Path(config.out)).with_suffix(".contexts.npy")
    return WholeContexts(source, config.activations, file, config.train.batch_tokens, device)


@dataclass(frozen=True)
class EndToEnd:
    """The objective of one batch, for `saes.step`."""

    weights: Weights
    batch: ContextBatch
    normalizer: Normalizer
    x: Float[Tensor, "tokens d"]
    """The rows of the batch, normalised."""

    def __call__(self, residual: Float[Tensor, "tokens d"]) -> Pull:
        reconstruction = (self.x - residual).detach().requires_grad_()
        units = self.normalizer.units(self.batch.rows.to(self.x.dtype))
        rows = self.normalizer.undo(reconstruction, units)
        effects = self.batch.effects(rows.detach(), self.weights)
        (gradient,) = torch.autograd.grad(rows, reconstruction, effects.gradient.to(rows))
        loss = self.weights.kl * effects.kl + self.weights.later * effects.later
        measured: dict[str, Tensor] = dict(zip(SUMS, (effects.kl, effects.later), strict=True))
        return Pull(loss.to(residual.dtype), gradient, measured)
