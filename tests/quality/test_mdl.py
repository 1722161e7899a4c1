"""Bits of codes whose entropy is known."""

from __future__ import annotations

import pytest
import torch

from harness.quality.mdl import binary_entropy, bits, entropies, judge
from tests.quality.planted import orthonormal, planted, rows, sparse


def test_a_constant_value_costs_only_which_latents() -> None:
    """Bernoulli(p) with one value: n·H₂(p). A zero is not a bin of its own."""
    generator = torch.Generator().manual_seed(0)
    n, p = 50, 0.1
    active = torch.rand(20_000, n, generator=generator) < p
    index = torch.arange(n).expand(20_000, n)
    which, how_much = bits(active.float() * 0.7, index, n, 0.1)
    expected = n * float(binary_entropy(torch.tensor([p], dtype=torch.float64)))
    assert which == pytest.approx(expected, rel=0.005) and how_much == 0


def test_entropies_of_uniform_symbols() -> None:
    symbols = torch.tensor([0, 1, 2, 3, 5, 5, 5, 5])
    owner = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])
    torch.testing.assert_close(entropies(symbols, owner, 3), torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))


def test_quantisation_costs_at_most_one_percent() -> None:
    D, a = orthonormal(32), sparse(2048, 32, 6)
    noise = 0.05 * torch.randn(2048, 32, generator=torch.Generator().manual_seed(1))
    values = judge(planted(D, k=6), rows(a @ D + noise), D).values
    # 6 of 32 latents, uniform on (0.5, 1.5): a bin narrower than the error needs a few bits for each
    assert 32 * 0.6 < values["bits_of_index"].value < 32 * 0.71
    assert 6 * 2 < values["bits_of_values"].value < 6 * 9
    assert values["bits_dense"].value > values["bits_of_values"].value
