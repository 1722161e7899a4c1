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

MOST_PICKED = 1 << 13
"""Elements that one program picks from: order and index of 8192 take 32 registers of each of 512 threads."""

ALIGNMENT = 64
"""Row strides of matrices are multiples of this many numbers."""


def padded(width: int) -> int:
    """Width of aligned rows that hold `width` numbers."""
    return -(-width // ALIGNMENT) * ALIGNMENT


def kept_whole(tokens: int, width: int, k: int, precision: str) -> bool:
    """Whether the k largest of `width` pre-activations stay where they are, as a matrix with zeros, when neither order
    nor negative values are asked for: products over the whole width follow, a program holds a row, and the matrix is no
    larger than a tile."""
    number = 2 if precision == "bf16" else 4
    fits = padded(width) <= MOST_PICKED and tokens * padded(width) * number <= TILE_BYTES
    return fits and width <= DENSE_ROWS_PER_K[precision] * k


def list_length(rows: int) -> int:
    """How long the list of `rows` dead latents is made: few lengths, so that a CUDA graph for each is seldom recorded,
    and at most an eighth longer than it must be, or 63 places."""
    eighth = (1 << max(0, rows - 1).bit_length()) // 16
    step = max(ALIGNMENT, eighth)
    return -(-rows // step) * step
