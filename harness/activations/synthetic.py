"""Rows from a known sparse dictionary: the ground truth for recovery. Endless, and without a language model.

    x = Σ_i s_i·m_i·f_i + noise

with unit-norm features f_i ∈ R^d, s_i ~ Bernoulli(p_i), p_i = min(1, c·i^−zipf_exponent) with c such that Σ p_i is
`active_features`, magnitudes m_i ~ U(½, 3/2), and Gaussian noise. More features than dimensions is superposition.
With `manifolds`, feature i is a sphere of dimension D_i instead of a direction: f_i is drawn anew for every row,
uniformly from the unit sphere in a random subspace of D_i + 1 dimensions.
Rows are made in blocks of 256. Each block has its own counter of a counter-based generator (Philox), so every row of
the endless stream can be computed without the rows before it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.sparse import csr_array
from torch import Tensor

from harness.activations.shuffle import digest64
from harness.activations.source import DTYPES, SAMPLE_ROWS
from harness.activations.statistics import Statistics, layernorm_rows
from harness.activations.stream import Stream
from harness.config import ActivationsConfig

BLOCK_ROWS = 256
MAGNITUDE_SECOND_MOMENT = 13 / 12
"""E m² of m ~ U(½, 3/2); E m = 1."""


def zipf_probabilities(n_features: int, exponent: float, active: float) -> Float64[np.ndarray, " features"]:
    """p_i = min(1, c·i^−exponent) with Σ p_i = active, 0 < active ≤ n_features."""
    weights = np.arange(1, n_features + 1, dtype=np.float64) ** -exponent
    # The m most frequent features are always on; m is the smallest number for which the next p is at most 1.
    for always in range(n_features):
        scale = (active - always) / weights[always:].sum()
        if scale * weights[always] <= 1:
            return np.concatenate([np.ones(always), scale * weights[always:]])
    return np.ones(n_features)


class Synthetic:
    """An `ActivationSource` that computes its rows. Each row is a document of its own."""

    train_rows: int | None = None

    def __init__(self, cfg: ActivationsConfig, identity: str) -> None:
        spec = cfg.synthetic
        self.id = identity
        self.d_model = spec.d_model
        self.heldout_rows = round(cfg.heldout_tokens)
        self.description: dict[str, Any] = {
            "kind": "synthetic",
            "seed": cfg.seed,
            "dtype": cfg.dtype,
            **dataclasses.asdict(spec),
            "harvest_flops": 0.0,
        }
        self._seed, self._dtype = cfg.seed, DTYPES[cfg.dtype]
        self._probability = zipf_probabilities(spec.n_features, spec.zipf_exponent, spec.active_features)
        dimension = np.resize(np.array(spec.manifolds or [0]), spec.n_features)
        self._width = dimension + 1
        # the rows of feature i are the next `_width[i]` ones
        features = _generator(cfg.seed, "features", 0).standard_normal((int(self._width.sum()), spec.d_model))
        self._features = features / np.linalg.norm(features, axis=1, keepdims=True)
        self._first = np.cumsum(self._width) - self._width
        for start, width in zip(self._first[dimension > 0], self._width[dimension > 0], strict=True):
            self._features[start : start + width] = np.linalg.qr(features[start : start + width].T)[0].T
        self._fixed = dimension == 0
        self._probability32, self._features32 = self._probability.astype(np.float32), self._features.astype(np.float32)
        p = self._probability
        # the mean of a point on a sphere is 0
        self._signal_variance = float(MAGNITUDE_SECOND_MOMENT * p.sum() - np.square(p[self._fixed]).sum())
        self._sigma = spec.noise * math.sqrt(self._signal_variance / spec.d_model)

    @property
    def dictionary(self) -> Float[Tensor, "features d"] | Float[Tensor, "features width d"]:
        if self._fixed.all():
            return torch.from_numpy(self._features).float()
        spans = np.zeros((len(self._width), self._width.max(), self.d_model), np.float32)
        feature = np.repeat(np.arange(len(self._width)), self._width)
        spans[feature, np.arange(len(feature)) - self._first[feature]] = self._features
        return torch.from_numpy(spans)

    def statistics(self, layernorm: bool) -> Statistics:
        """Raw: exact, from the probabilities. With `layernorm`: of the fixed sample."""
        if layernorm:
            rows = layernorm_rows(self.sample().double())
            mean = rows.mean(dim=0)
            mean_sq_norm = float(rows.square().sum(dim=1).mean())
            return Statistics(len(rows), mean, mean_sq_norm, mean_sq_norm - float(mean.square().sum()))
        mean = torch.from_numpy(self._probability[self._fixed] @ self._features[self._first[self._fixed]])
        variance = self._signal_variance + self.d_model * self._sigma**2
        return Statistics(SAMPLE_ROWS, mean, variance + float(mean.square().sum()), variance)

    def sample(self) -> Float[Tensor, "rows d"]:
        return self._rows("sample", 0, 0, SAMPLE_ROWS).float()

    def stream(self, seed: int, batch_tokens: int, device: torch.device, dp_rank: int = 0, dp: int = 1) -> Stream:
        block = functools.lru_cache(maxsize=2)(functools.partial(self._block, "train", seed))

        def fill(start: int, end: int, out: Tensor) -> None:
            for number in range(start // BLOCK_ROWS, -(-end // BLOCK_ROWS)):
                first, last = max(start, number * BLOCK_ROWS), min(end, (number + 1) * BLOCK_ROWS)
                out[first - start : last - start] = block(number)[first - number * BLOCK_ROWS :][: last - first]

        return Stream(fill, self.d_model, self._dtype, batch_tokens, device, dp_rank, dp)

    def heldout(self, batch_rows: int) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
        for start in range(0, self.heldout_rows, batch_rows):
            end = min(start + batch_rows, self.heldout_rows)
            yield self._rows("heldout", 0, start, end), torch.arange(start, end)

    def _rows(self, purpose: str, seed: int, start: int, end: int) -> Float[Tensor, "rows d"]:
        first = start // BLOCK_ROWS
        blocks = [self._block(purpose, seed, number) for number in range(first, -(-end // BLOCK_ROWS))]
        return torch.cat(blocks)[start - first * BLOCK_ROWS : end - first * BLOCK_ROWS]

    def _block(self, purpose: str, seed: int, number: int) -> Float[Tensor, "rows d"]:
        random = _generator(self._seed, (purpose, seed), number)
        on = random.random((BLOCK_ROWS, len(self._probability)), np.float32) < self._probability32
        ends = np.cumsum(np.count_nonzero(on, axis=1))
        magnitudes = random.random(ends[-1], np.float32) + np.float32(0.5)
        active = np.nonzero(on)[1]
        if not self._fixed.all():
            magnitudes, active, ends = self._points(random, magnitudes, active, ends)
        codes = csr_array((magnitudes, active, np.concatenate([[0], ends])), (BLOCK_ROWS, len(self._features)))
        # a sparse product adds in the order of the features: the sum depends neither on BLAS nor on threads
        rows = codes @ self._features32
        rows += random.standard_normal(rows.shape, np.float32) * np.float32(self._sigma)
        return torch.from_numpy(rows).to(self._dtype)

    def _points(
        self, random: np.random.Generator, magnitudes: np.ndarray, active: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same entries of codes with a random point for each active feature: an entry for each row of its span."""
        width = self._width[active]
        stop = np.cumsum(width)
        entry = np.repeat(np.arange(len(active)), width)
        point = random.standard_normal(len(entry), np.float32)
        point[np.repeat(self._fixed[active], width)] = 1.0
        norm = np.sqrt(np.bincount(entry, np.square(point), len(active))).astype(np.float32)
        rows = self._first[active][entry] + np.arange(len(entry)) - (stop - width)[entry]
        return point * (magnitudes / norm)[entry], rows, np.concatenate([[0], stop])[ends]


def _generator(seed: int, purpose: object, counter: int) -> np.random.Generator:
    key = digest64("synthetic", seed, purpose)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, counter, 0]))


CLOSE = 0.9
"""Cosine above which a latent belongs to a true feature."""


def cosines(
    decoder: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "features d"] | Float[Tensor, "features width d"],
    block: int = 1024,
) -> Iterator[Float[Tensor, "block n"]]:
    """Of some true features with all latents, block by block; with a span, the cosine of the angle to it. A zero row of
    the decoder has cosine 0 with everything."""
    latents = torch.nn.functional.normalize(decoder.detach().to(dictionary), dim=1)
    for rows in torch.nn.functional.normalize(dictionary, dim=-1).split(block):
        products = rows @ latents.T
        # a direction has a sign, a span has none
        yield products if rows.dim() == 2 else products.square().sum(dim=1).sqrt()


def best_cosines(
    decoder: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "features d"] | Float[Tensor, "features width d"],
    block: int = 1024,
) -> Float[Tensor, " features"]:
    """The largest cosine of each true feature with a latent."""
    return torch.cat([part.amax(dim=1) for part in cosines(decoder, dictionary, block)])


def close_latents(decoder: Float[Tensor, "n d"], dictionary: Float[Tensor, "features width d"]) -> int:
    """Latents that belong to a sphere, counted for each sphere."""
    return sum(int((part > CLOSE).sum()) for part in cosines(decoder, dictionary))


def recovered(best: Float[Tensor, " features"]) -> dict[str, float]:
    """How much of the true dictionary a decoder holds, from `best_cosines`.

    `recovered`: share of the true features that have a latent with cosine above 0.9. `mean_max_cosine`: mean over the
    true features of the largest cosine with a latent.
    """
    return {"recovered": float((best > CLOSE).float().mean()), "mean_max_cosine": float(best.mean())}
