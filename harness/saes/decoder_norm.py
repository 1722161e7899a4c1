"""TopK by what a latent adds to the reconstruction, a·‖d‖, with a free decoder; one threshold at inference.

That is how Llama Scope chooses latents (arXiv 2410.20526), and its conversion to JumpReLU: latent i is active where
a_i·‖d_i‖ exceeds the value that k latents of a training token exceed on average.
"""

from __future__ import annotations

from dataclasses import replace

from harness.ops import per_entry
from harness.ops.untyped import norm
from harness.saes.batchtopk import BatchTopK
from harness.saes.entries import Batch, Entries
from harness.saes.sae import Params
from harness.saes.start import Start
from harness.saes.topk import active

MEASURED_EVERY_STEPS = 8
"""Steps between measurements of the threshold, each of which encodes the batch once more."""


class TopKDecoderNorm(BatchTopK):
    def parameters(self, start: Start) -> Params:
        """Rows of norm 1 at the start, as for TopK."""
        encoder = start.params["W_enc"]
        rows = {"W_enc": encoder / norm(encoder, dim=1, keepdim=True), "W_dec": start.directions.clone()}
        return rows | super().parameters(start)

    def select(self, batch: Batch) -> Entries:
        norms = norm(batch.params["W_dec"], dim=1)
        W_enc, b_enc = batch.compute["W_enc"], batch.params["b_enc"]
        # an SAE whose pre-activations are a·‖d‖
        scaled = replace(
            batch,
            params={**batch.params, "b_enc": b_enc * norms},
            compute={**batch.compute, "W_enc": W_enc * norms[:, None].to(W_enc.dtype)},
        )
        found = self._largest(scaled) if batch.training else super().select(scaled)
        norm_of = per_entry(norms, found.index)
        return Entries(found.pre / norm_of, found.index, found.z / norm_of)

    def _largest(self, scaled: Batch) -> Entries:
        """The k largest of each token; now and then the threshold is measured."""
        if scaled.step % MEASURED_EVERY_STEPS == 0:
            self.measure(scaled, scaled.step // MEASURED_EVERY_STEPS)
        W_enc, bias, k = scaled.compute["W_enc"], scaled.params["b_enc"], scaled.sae.k
        codes = scaled.ops.select(scaled.inputs, W_enc, bias, k, scaled.routing.groups)
        return Entries(codes.values, codes.index, active(scaled.sae, codes, k, scaled.shards, "selection"))
