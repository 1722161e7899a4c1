"""How much the GPU kernels hold at a time: for the kernels, and for plans, which need no Triton."""

from __future__ import annotations

TILE_BYTES = 1 << 29
"""Pre-activations. Every tile reads the encoder again, so tiles are large: at d = 768, tiles that fit the L2 cache
would read as many bytes of weights as they save of pre-activations."""

PIECE = 256
"""Entries of a latent that one program sums; the sums of further pieces have rows of their own."""

WINNER_BYTES = 12
"""Of each entry while it is chosen: its lane and its order."""

DENSE_ROWS_PER_K = {"bf16": 120, "fp32": 20}
"""A group of at most this many latents per active one is cheaper as dense products, by precision. Worked out, not
measured: three gathers of k rows at 4.3 TB/s against four products at 790 (bf16) or 60 (fp32, no tensor cores) TFLOP/s
on an H200."""
