"""BatchTopK: the k·B largest latents of the whole batch, so that tokens differ in how many they use. Matryoshka.

During training the selection is exact over the global batch on any mesh. For inference it is replaced by a threshold:
the running mean of the smallest value that each batch kept (Bussmann et al. 2024, section 3).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from harness.ops import Codes, Nesting
from harness.parallel.kth import kth_largest, number_of, ordered_bits
from harness.saes.entries import Backward, Batch, Entries
from harness.saes.sae import Params, Sae
from harness.saes.start import Start

MARGIN = 0.9
"""Candidates are the values above this share of the expected threshold; fewer candidates cost less, too few cost
another look."""

SMALLEST = torch.finfo(torch.float32).tiny


class BatchTopK:
    def parameters(self, start: Start) -> Params:
        """`threshold`: what a value must exceed at inference; the mean of the batches' thresholds."""
        return {"threshold": start.params["b_dec"].new_zeros(1)}

    def select(self, batch: Batch) -> Entries:
        if not batch.training:
            theta = batch.params["threshold"].expand(batch.params["W_enc"].shape[0])
            codes = _above(batch, theta)
            return Entries(codes.values, codes.index, codes.values.where(codes.values > theta[:1], 0.0).relu())
        codes, chosen = self.measure(batch, batch.step)
        return Entries(codes.values, codes.index, codes.values.where(chosen, 0.0))

    def measure(self, batch: Batch, number: int) -> tuple[Codes, Bool[Tensor, "own capacity"]]:
        """Candidates and which of them are among the k·B largest of the batch; moves the threshold, for the `number`-th
        time (from 0), towards the smallest of these."""
        codes, count = self._candidates(batch)
        chosen, threshold = _largest_of_batch(batch, codes.values, count)
        batch.params["threshold"].copy_(_running_mean(batch.params["threshold"], threshold, number))
        return codes, chosen

    def _candidates(self, batch: Batch) -> tuple[Codes, int]:
        """All positive values that may be among the k·B largest of the batch, and how many all ranks have: at least
        k·B, or all positive ones."""
        sae, shards, params = batch.sae, batch.shards, batch.params
        if batch.step:
            guess = MARGIN * float(params["threshold"])
        else:
            largest = batch.ops.select(
                batch.inputs, batch.compute["W_enc"], params["b_enc"], sae.k, batch.routing.groups
            )
            guess = float(shards.sum_(largest.values[:, -1].relu().mean(), "all", "selection")) / shards.size
        # 0 itself is not active
        for least in (guess, guess / 2, guess / 8, 0.0):
            theta = params["b_enc"].new_full((params["W_enc"].shape[0],), max(least, SMALLEST))
            codes = _above(batch, theta)
            count = int(shards.sum_((~codes.values.isneginf()).sum(), "all", "selection"))
            if count >= sae.k * batch.global_tokens:
                break
        return codes, count

    def backward(self, batch: Batch, entries: Entries, dz: Tensor, sparsity: Tensor | float) -> Backward:
        return Backward(dz)


def _above(batch: Batch, theta: Float[Tensor, " rows"]) -> Codes:
    W_enc, bias = batch.compute["W_enc"], batch.params["b_enc"]
    return batch.ops.select_above(batch.inputs, W_enc, bias, theta, batch.routing.groups)


def _running_mean(mean: Tensor, value: Tensor, step: int, most: int = 100) -> Tensor:
    """The mean of about the last twentieth of the values, at most `most`: thresholds move as the weights do, most at
    the start. It begins at the first value, so it has no bias towards 0."""
    return torch.lerp(mean, value.to(mean.dtype), 1 / min(step // 20 + 1, most))


def _largest_of_batch(
    batch: Batch, values: Float[Tensor, "own capacity"], count: int
) -> tuple[Bool[Tensor, "own capacity"], Float[Tensor, " one"]]:
    """Which values are among the k·B largest of the global batch (equal ones: lowest token, then lowest latent), and
    the smallest of these. All ranks together have `count` values."""
    shards, wanted = batch.shards, batch.sae.k * batch.global_tokens
    present = ~values.isneginf()
    flat = values[present]
    if count <= wanted:
        return present, flat.new_zeros(1)
    threshold, spare, ties = kth_largest(flat, wanted, shards, "selection")
    smallest = number_of(threshold, values.dtype)
    if spare == ties:
        return ~(values < smallest), smallest  # NaN is largest
    bits = ordered_bits(values.relu().flatten()).view(values.shape)
    equal = present & (bits == threshold)
    chosen = (present & (bits > threshold)) | (equal & (_place_of_equals(batch, equal) < spare))
    return chosen, smallest


def _place_of_equals(batch: Batch, equal: Bool[Tensor, "own capacity"]) -> Tensor:
    """How many of the equal values of all ranks come before each of them: by token of the global batch, then latent."""
    shards, tokens = batch.shards, equal.shape[0]
    per_token = torch.zeros(shards.dp, tokens, shards.shard, dtype=torch.int64, device=equal.device)
    per_token[shards.dp_rank, :, shards.shard_rank] = equal.sum(dim=1)
    per_token = shards.sum_(per_token, "all", "selection").flatten()
    before = (per_token.cumsum(0) - per_token).view(shards.dp, tokens, shards.shard)
    return before[shards.dp_rank, :, shards.shard_rank, None] + equal.cumsum(dim=1) - equal.long()


class Matryoshka(BatchTopK):
    """BatchTopK that also reconstructs from the first latents alone, for several nested prefixes of the latents; the
    loss is the mean of the errors (Bussmann et al. 2025, equation 3)."""

    def select(self, batch: Batch) -> Entries:
        entries = super().select(batch)
        return self._nested(batch, entries) if batch.training else entries

    def _nested(self, batch: Batch, entries: Entries) -> Entries:
        sae = batch.sae
        own = batch.shards.rows(sae.n_latents)
        ends = [min(max(end - own.start, 0), own.stop - own.start) for end in prefix_ends(sae)]
        of_row = torch.zeros(own.stop - own.start, dtype=torch.uint8, device=entries.index.device)
        for end in ends[:-1]:
            of_row[end:] += 1
        nesting = Nesting(of_row[entries.index], (1 / len(ends),) * len(ends), headline=len(ends) - 1)
        return Entries(entries.pre, entries.index, entries.z, nesting)


def prefix_ends(sae: Sae) -> list[int]:
    """Number of latents of each prefix, ascending; the last is n. Equal ones count once."""
    return sorted({max(1, round(share * sae.n_latents)) for share in sae.prefixes} | {sae.n_latents})
