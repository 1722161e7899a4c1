"""The memory of one rank on a GPU as formulas. `python -m harness.bench.memory` compares them with the real code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from harness import budget
from harness.config import Config
from harness.ops import sizes


def gpu_memory(config: Config, d_model: int) -> dict[str, int]:
    """Bytes of one rank by part, at the peak of a step, an evaluation or a save.

    weights: with gradients, moments, low-precision copies, average. counters: since when each latent is silent, and how
    often it fired. step: what a step with AuxK over a share `budget.PLANNED_DEAD` of the latents, or an evaluation,
    holds in addition, whichever is more.
    """
    train, sae, mesh = config.train, config.sae, config.mesh
    word = budget.word_bytes(train)
    low = 2 if train.precision == "bf16" else word
    rows, numbers = sae.n_latents // mesh.shard, budget.params(sae, d_model) // mesh.shard
    matrices = 2 * rows * d_model
    weights = numbers * word * (5 if train.ema else 4) + (low * matrices if low != word else 0)
    k = min(round(budget.most_active(sae)), sae.n_latents)
    entries = _Entries(
        sae.visits * train.batch_tokens // mesh.dp, d_model, word, low, mesh.shard if not sae.traits.routed else 1
    )
    width = sae.n_latents // sae.n_experts // (1 if sae.traits.routed else mesh.shard)
    evaluated = dataclasses.replace(entries, tokens=budget.EVALUATION_BATCH, low=word)
    return {
        "weights": weights,
        "counters": (8 + 8 + 1) * rows,
        "step": round(max(_step(config, entries, k, rows, width), _evaluation(config, evaluated, k, numbers, width))),
    }


def _step(config: Config, entries: _Entries, k: int, rows: int, width: int) -> float:
    """The largest of: choosing latents, weight gradients, AuxK, mutual feature regularisation, the update."""
    sae, groups = config.sae, max(1, rows // width)
    nested = len(sae.prefixes) if sae.architecture == "matryoshka" else 2 * (sae.traits.passes > 1)
    held = entries.batch(budget.NUMBER_BYTES[config.activations.dtype]) + nested * entries.residual
    chosen = entries.codes(k)
    backward = entries.gradients(k, rows, width) + (entries.nested(k, width, nested) if nested else 0)
    own = max(entries.select(k, width), entries.residual + chosen + backward)
    aux = 0.0
    if sae.aux_alpha:
        listed = min(width, sizes.list_length(int(budget.PLANNED_DEAD * rows) // groups))
        k_aux = max(1, min(budget.aux_k(sae, entries.d_model), listed))
        aux = entries.residual + chosen + _aux(entries, k_aux, groups, listed, sae.traits.routed)
    # the norm of the gradient squares one matrix at a time
    update = entries.residual + chosen + entries.word * rows * entries.d_model if config.train.clip_norm else 0.0
    mutual = entries.residual + chosen + budget.mutual_bytes(config, entries.d_model)
    return held + max(own, aux, update, mutual)


def _aux(entries: _Entries, k: int, groups: int, width: int, scaled: bool) -> float:
    """Copies of the listed rows of both matrices and their gradients, and a second selection and reconstruction.
    `width`: rows listed in each group; `scaled`: as in `_Entries.gradients`, by the router."""
    listed = groups * width
    copies = listed * (2 * entries.d_model * entries.low + 8 + 4)
    grads = listed * (2 * entries.d_model + 1) * entries.word
    if entries.shards == 1 and sizes.kept_whole(entries.tokens, width, k, entries.precision):
        # activations and their gradients as matrices, and the residual in the precision of products
        matrices = 2 * entries.tokens * sizes.padded(width) * entries.low
        low = entries.residual / entries.word * entries.low if entries.low != entries.word else 0
        return copies + entries.residual + matrices + low + grads
    # activations replace pre-activations
    chosen = entries.codes(k) - entries.tokens * k * entries.word
    backward = grads + entries.gradients(k, listed, width, scaled)
    return copies + max(entries.select(k, width), entries.residual + chosen + backward)


def _evaluation(config: Config, entries: _Entries, k: int, numbers: int, width: int) -> float:
    average = numbers * entries.word if config.train.ema else 0
    held = entries.batch(budget.NUMBER_BYTES[config.activations.dtype])
    return (
        average + held + max(entries.select(k, width), entries.residual + entries.codes(k) + entries.decode(k, width))
    )


@dataclass(frozen=True)
class _Entries:
    """A batch and its chosen latents on the GPU; all methods return bytes."""

    tokens: int
    d_model: int
    word: int
    low: int
    """Bytes of a number in products."""
    shards: int
    """Ranks among which the latents of a token are chosen."""

    @property
    def precision(self) -> str:
        """Of products, by its name in `sizes`."""
        return "bf16" if self.low == 2 else "fp32"

    @property
    def residual(self) -> float:
        return self.tokens * self.d_model * self.word

    def batch(self, stored: int) -> float:
        """The batch and the next one as they are stored; normalised; centred, also in the precision of products."""
        low = self.low if self.low != self.word else 0
        return self.tokens * self.d_model * (2 * stored + 2 * self.word + low)

    def codes(self, k: int) -> float:
        """Pre-activations, indices, activations and their gradients."""
        return self.tokens * k * (3 * self.word + 8)

    def _block(self, row_bytes: int) -> int:
        """Tokens of a tile with such rows."""
        return min(self.tokens, max(1, sizes.TILE_BYTES // row_bytes))

    def is_dense(self, k: int, width: int) -> bool:
        return width <= sizes.DENSE_ROWS_PER_K[self.precision] * k

    def select(self, k: int, width: int) -> float:
        """Pre-activations of a block of tokens with their winners; values and indices of all tokens; candidates of all
        shards."""
        row = width * self.low
        own = self._block(row) * (row + k * sizes.WINNER_BYTES) + self.tokens * k * (self.word + 8)
        # sent and received, at the owner in order of shards and sorted, and where they come from
        exchanged = self.tokens * k * (5 * self.word + 2 * 8) if self.shards > 1 else 0
        return max(own, self.tokens * k * (self.word + 8) + exchanged)

    def decode(self, k: int, width: int) -> float:
        """Beyond codes and residual. As dense products: of a block of tokens the codes and products as matrices, and
        the residual in the precision of products; and the columns of all."""
        if not self.is_dense(k, width):
            return 0.0
        low = self.d_model * self.low if self.low != self.word else 0
        return self._block(width * 4) * (width * (self.low + 4) + low) + self.tokens * k * 8

    def nested(self, k: int, width: int, blocks: int) -> float:
        """As dense products: the values of each block of entries, two more gradients of them, and the residual in the
        precision of products."""
        if not self.is_dense(k, width):
            return 0.0
        low = self.tokens * self.d_model * self.low if self.low != self.word else 0
        return self.tokens * k * self.word * (blocks + 2) + low

    def gradients(self, k: int, rows: int, width: int, scaled: bool = True) -> float:
        """Beyond codes and residual: weighted values and gradients (if `scaled`), and either codes as matrices, or the
        entries in order of their latents and sums of pieces of both matrices."""
        weighted = self.tokens * k * 2 * self.word if scaled else 0
        if self.is_dense(k, width):
            return max(weighted + self._block(width * 4) * width * self.low, self.decode(k, width))
        residual = self.tokens * self.d_model * self.low if self.low != self.word else 0
        index = 2 if rows <= 1 << 16 else 4
        order = self.tokens * k * (2 * index + 8) + rows * 3 * 8
        return weighted + residual + order + self.tokens * k * 4 * (2 * self.d_model + 1) / sizes.PIECE
