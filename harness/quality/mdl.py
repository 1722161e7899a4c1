"""Minimum description length: bits per token that the codes take, if each latent is coded by itself (arXiv 2410.11179).

Σ_i [H₂(p_i) + p_i·H(quantised activation of latent i, where it is active)], at the coarsest bin width that leaves fvu
within 1 % of that of unquantised codes. Zeros are coded once, by H₂(p_i): no bin contains them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from harness.quality.metric import Outcome, Subject
from harness.quality.shared import Rows, Shared
from harness.record.quality import Value
from harness.saes.trained import TokenCodes, TrainedSae

VERSION = 1
TOLERANCE = 0.01
"""Relative rise of fvu that quantisation may cause."""
_STEPS = 24
"""Bin widths that are tried: the mean activation times 2^(2 − j/2), j from 0."""
_BATCH = 4096


def binary_entropy(p: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """In bits."""
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / math.log(2)


def entropies(symbols: Int[Tensor, " entries"], owner: Int[Tensor, " entries"], n: int) -> Float64[Tensor, " n"]:
    """Entropy in bits of the symbols of each owner (0 to n−1); 0 for an owner without any."""
    _, symbol = torch.unique(symbols, return_inverse=True)
    pairs, counts = torch.unique(owner * (int(symbol.max()) + 1 if len(symbol) else 1) + symbol, return_counts=True)
    of = pairs // (int(symbol.max()) + 1 if len(symbol) else 1)
    totals = torch.zeros(n, dtype=torch.float64).index_add_(0, of, counts.double())
    share = counts.double() / totals[of]
    return torch.zeros(n, dtype=torch.float64).index_add_(0, of, -torch.special.xlogy(share, share) / math.log(2))


def bits(values: Float[Tensor, "rows k"], index: Int[Tensor, "rows k"], n: int, width: float) -> tuple[float, float]:
    """Bits per token for which latents are active, and for their quantised activations."""
    active = values > 0
    owner = index[active]
    p = torch.bincount(owner, minlength=n).double() / len(values)
    symbols = torch.div(values[active], width, rounding_mode="floor").long()
    return float(binary_entropy(p).sum()), float((p * entropies(symbols, owner, n)).sum())


def quantised(codes: TokenCodes, width: float) -> TokenCodes:
    """Activations at the middle of their bins; those that are 0 stay 0."""
    middle = (torch.div(codes.values, width, rounding_mode="floor") + 0.5) * width
    return replace(codes, values=middle.where(codes.values > 0, 0.0))


def _error(sae: TrainedSae, rows: Rows, codes: Sequence[TokenCodes], width: float | None) -> float:
    total = 0.0
    for x, part in zip(rows.x.split(_BATCH), codes, strict=True):
        decoded = sae.decode(part if width is None else quantised(part, width)).cpu()
        total += float((x - decoded).square().sum(dtype=torch.float64))
    return total


def _coarsest(fits, widths: Sequence[float]) -> float:
    """The first of the falling `widths` that `fits`, by bisection; the last if none does."""
    low, high = 0, len(widths) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(widths[middle]) else (middle + 1, high)
    return widths[low]


def judge(sae: TrainedSae, rows: Rows, directions: Float[Tensor, "d d"], tick=lambda done: None) -> Outcome:
    """Figures of one SAE. `directions`: principal directions of the activations, for the dense code of equal error."""
    n = sae.sae.n_latents
    codes = []
    for x in rows.x.split(_BATCH):
        codes.append(sae.encode(x))
        tick(len(codes) * _BATCH / 2)
    capacity = max(part.values.shape[1] for part in codes)
    values = torch.cat([_padded(part.values.clamp_min(0), capacity) for part in codes]).cpu()
    index = torch.cat([_padded(part.index, capacity) for part in codes]).cpu()
    error = _error(sae, rows, codes, None)
    typical = float(values[values > 0].double().mean()) if bool((values > 0).any()) else 1.0
    widths = [typical * 2 ** (2 - j / 2) for j in range(_STEPS)]
    width = _coarsest(lambda w: _error(sae, rows, codes, w) <= (1 + TOLERANCE) * error, widths)
    which, how_much = bits(values, index, n, width)
    l0 = float((values > 0).double().sum() / len(values))
    results = {
        "bits_per_token": Value(which + how_much),
        "bits_of_index": Value(which),
        "bits_of_values": Value(how_much),
        "bits_uniform": Value(_log2_choose(n, l0) + how_much),
        "bits_dense": Value(_dense_bits(rows, directions, error)),
        "l0": Value(l0),
        "bin_width": Value(width),
    }
    return Outcome(len(rows.x), results)


def _padded(values: Tensor, capacity: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, capacity - values.shape[1]))


def _log2_choose(n: int, k: float) -> float:
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)


def _dense_bits(rows: Rows, directions: Float[Tensor, "d d"], error: float) -> float:
    """Bits per token of principal components, all quantised with the coarsest width that gives at most `error`."""
    components = (rows.x - rows.mean) @ directions.T
    spread = float(components.std())

    def rounded(width: float) -> Tensor:
        return torch.round(components / width)

    widths = [spread * 2 ** (6 - j / 4) for j in range(64)]
    width = _coarsest(lambda w: float((components - rounded(w) * w).square().sum(dtype=torch.float64)) <= error, widths)
    columns = rounded(width).long().T
    owner = torch.zeros(len(rows.x), dtype=torch.int64)
    return sum(float(entropies(column, owner, 1)) for column in columns)


def run(subjects: Sequence[Subject], shared: Shared) -> Iterator[tuple[Subject, Outcome]]:
    rows, directions = shared.rows, shared.reference.directions
    shared.progress.start("mdl", len(subjects) * len(rows.x))
    for number, subject in enumerate(subjects):
        yield (
            subject,
            judge(subject.load(), rows, directions, lambda done, n=number: shared.tick(n * len(rows.x) + done)),
        )
