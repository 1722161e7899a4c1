"""Which latents are active together: exact counts and correlations, for a block of latents against all."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Float64

from harness.quality.features.codes import CodeFiles, Entries

PARTNERS = 10
_TOKENS = 1 << 16
"""Tokens whose activations are in memory at once."""


def block_columns(
    codes: CodeFiles,
    entries: Entries,
    first: int,
    last: int,
    mean: Float64[np.ndarray, " n"],
    mean_square: Float64[np.ndarray, " n"],
) -> dict[str, np.ndarray]:
    """The `PARTNERS` latents whose activations correlate most with those of each latent, over all tokens.

    `coactive_share` is the share of the latent's active tokens at which the partner is active too. −1: no further
    latent is ever active together with it.
    """
    size, n = last - first, codes.n_latents
    counts, products = np.zeros((size, n)), np.zeros((size, n))
    entries = Entries(*(column[entries.token.argsort(kind="stable")] for column in entries))
    for start in range(0, codes.tokens, _TOKENS):
        end = min(start + _TOKENS, codes.tokens)
        own = Entries(*(column[slice(*np.searchsorted(entries.token, (start, end)))] for column in entries))
        if not len(own.token):
            continue
        everyone = codes.of_tokens(start, end)
        rows = codes.ends[start : end + 1] - codes.ends[start]
        theirs: Any = scipy.sparse.csr_array((everyone.value, everyone.latent, rows), shape=(end - start, n))
        mine: Any = scipy.sparse.csr_array(
            (own.value, (own.latent - first, own.token - start)), shape=(size, end - start)
        )
        products += (mine.astype(np.float64) @ theirs).toarray()
        counts += (_ones(mine) @ _ones(theirs)).toarray()
    spread = np.sqrt(np.maximum(mean_square - mean**2, 0))
    own_spread = spread[first:last, None]
    covariance = products / max(codes.tokens, 1) - mean[first:last, None] * mean
    correlation = covariance / np.where(own_spread * spread > 0, own_spread * spread, 1)
    alone = counts == 0
    alone[np.arange(size), np.arange(first, last)] = True
    correlation[alone] = -np.inf
    best = np.argsort(-correlation, axis=1, kind="stable")[:, :PARTNERS]
    found = np.take_along_axis(correlation, best, 1)
    total = np.take_along_axis(counts, np.arange(first, last)[:, None], 1)
    share = np.take_along_axis(counts, best, 1) / np.where(total > 0, total, 1)
    missing = np.isneginf(found)
    return {
        "coactive": np.where(missing, -1, best).astype(np.int32),
        "coactive_correlation": np.where(missing, 0, found).astype(np.float32),
        "coactive_share": np.where(missing, 0, share).astype(np.float32),
    }


def _ones(matrix: Any) -> Any:
    return scipy.sparse.csr_array((np.ones(matrix.nnz), matrix.indices, matrix.indptr), shape=matrix.shape)
