"""Pre-activations that break truncated or careless sharded selections."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

AWKWARD = (0.0, -0.0, 1.0, -1.0, 0.5, torch.inf, float(torch.finfo(torch.float32).tiny), 1e30)
"""Few values, so that nearly everything is a tie; zeros of both signs are equal."""


@st.composite
def selections(draw: st.DrawFn, shard: int) -> tuple[Tensor, int]:
    """(tokens, n) float32 values, n divisible by `shard`, and k ≤ n: as often as not more than a shard's latents."""
    rows, tokens = draw(st.integers(1, 8)), draw(st.integers(1, 9))
    n = rows * shard
    k = draw(st.one_of(st.integers(1, n), st.just(n), st.just(rows), st.just(min(n, rows + 1))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    a = torch.randn(tokens, n, generator=generator)
    kind = draw(st.sampled_from(["spread", "all equal", "few values", "ties across shards"]))
    if kind == "all equal":
        a = torch.full((tokens, n), draw(st.floats(width=32, allow_nan=False, allow_infinity=False)))
    elif kind == "few values":
        levels = torch.tensor(draw(st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=4)))
        a = levels[torch.randint(len(levels), (tokens, n), generator=generator)]
    elif kind == "ties across shards":
        a = a[:, torch.arange(n) % rows]
    if draw(st.booleans()):
        a = a.to(torch.bfloat16).float()
    if draw(st.booleans()):
        a = -a.abs()
    if draw(st.booleans()):
        hot = draw(st.integers(0, shard - 1))
        a[:, hot * rows : (hot + 1) * rows] += 100
    # −inf is what a selection pads with: no finite weights give it, and it is never active
    return a.clamp_min(torch.finfo(torch.float32).min), k


def chosen(preactivations: Tensor, k: int) -> Tensor:
    """The definition: which of (tokens, n) values are among the k largest of their row, equal ones by lowest index."""
    order = preactivations.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros(preactivations.shape, dtype=torch.bool).scatter_(1, order, True)
