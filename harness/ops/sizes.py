"""How much the GPU kernels hold at a time: for the kernels, and for plans, which need no Triton."""

from __future__ import annotations

TILE_BYTES = 1 << 29
"""Pre-activations. Every tile reads the encoder again, so tiles are large: at d = 768, tiles that fit the L2 cache
would read as many bytes of weights as they save of pre-activations."""

PIECE = 256
"""Entries of a latent that one program sums; the sums of further pieces have rows of their own."""


def bytes_per_token(k: int, d_model: int) -> float:
    """What selection and weight gradients hold for each token: chosen lanes and winners (12 bytes an entry); the
    entries' latents and order, sorted and unsorted, with room for the sort (32); sums of pieces of both matrices."""
    return k * (12 + 32 + 2 * 4 * d_model / PIECE)
