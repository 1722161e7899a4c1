"""Pre-activations that break truncated or careless sharded selections."""

from __future__ import annotations

import torch

KINDS = ("random", "one hot shard", "all equal", "ties across shards", "negative", "bf16", "zeros and ones", "infinite")


def preactivations(kind: str, tokens: int, n: int, seed: int) -> torch.Tensor:
    """(tokens, n) float32 values of a named kind."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(tokens, n, generator=generator)
    if kind == "one hot shard":
        a[:, (seed % 4) * n // 4 : (seed % 4 + 1) * n // 4] += 100
    elif kind == "all equal":
        a = torch.full((tokens, n), float(seed - 5))
    elif kind == "ties across shards":
        a = a[:, torch.arange(n) % (n // 4)]
    elif kind == "negative":
        a = -a.abs() - 0.1
    elif kind == "bf16":
        a = a.to(torch.bfloat16).float()
    elif kind == "zeros and ones":
        a = (a > 0.5).float()
    elif kind == "infinite":
        a[:, 5] = torch.inf
        a[:, 17] = torch.inf
    return a
