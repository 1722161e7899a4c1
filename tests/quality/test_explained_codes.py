"""Reconstruction from simulated activations, where what is lost is known."""

from __future__ import annotations

import pytest
import torch

from harness.quality.explained_codes import (
    pattern_activations,
    reconstruction,
    token_activations,
    with_activations,
)
from harness.quality.refinement import effective
from harness.quality.shared import Shared
from tests.quality.planted import orthonormal, planted, planted_words


def test_the_scale_of_a_simulation_is_fitted() -> None:
    true = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    simulated = true * torch.tensor([2.0, 1.0, 0.0])
    found = pattern_activations(true, simulated, torch.arange(40) < 20)
    torch.testing.assert_close(found, true * torch.tensor([1.0, 1.0, 0.0]))


def test_the_table_of_tokens_takes_two_then_one_then_the_mean() -> None:
    ids = torch.tensor([[1, 2, 1, 3], [1, 2, 4, 3], [5, 2, 9, 2]])
    true = torch.arange(1.0, 13).reshape(12, 1)
    known = torch.arange(12) < 8
    found = token_activations(true, ids, known).reshape(3, 4)
    assert found[0].tolist() == [3, 4, 3, 4]  # (start, 1): 1 and 5; (1, 2): 2 and 6; (2, 1): 3; (1, 3): 4
    assert found[1].tolist() == [3, 4, 7, 8]
    # the third text is new: (5, 2) was not seen, so 2 alone; 5 and 9 were not, so the mean of all
    assert found[2].tolist() == [4.5, 4, 4.5, 4]


def test_exchanged_activations_are_decoded() -> None:
    W_dec = orthonormal(8)
    sae = planted(W_dec, k=3, scale=2.0)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(1))
    codes = sae.encode(x)
    own = torch.zeros(20, 8).scatter_add(1, codes.index, effective(codes))
    latents = torch.tensor([1, 6])
    torch.testing.assert_close(sae.decode(with_activations(codes, latents, own[:, latents])), sae.decode(codes))
    without = sae.decode(with_activations(codes, latents, torch.zeros(20, 2)))
    torch.testing.assert_close(without, sae.decode(codes) - own[:, latents] @ W_dec[latents] * 2.0)


def test_true_activations_cost_nothing_and_the_mean_does(embedding_shared: Shared) -> None:
    """Latents 0 and 1 are words, so the table of tokens is exact as well."""
    shared = embedding_shared
    sae, text = planted_words(shared), shared.text
    true = torch.zeros(text.ids.numel(), 2)
    codes = sae.encode(text.hidden.flatten(0, 1))
    for latent in range(2):
        true[:, latent] = effective(codes).where(codes.index == latent, 0.0).sum(dim=1)
    built_on = text.document % 2 == 0
    found = reconstruction(sae, shared, [0, 1], true, 3 * true, built_on, "")
    assert found["energy"].value == found["kl_increase"].value == 0
    assert found["energy_tokens"].value < found["energy_mean"].value / 100
    nothing = reconstruction(sae, shared, [0, 1], true, 0 * true, built_on, "")
    # no explanation at all removes the latents
    assert nothing["energy"].value > found["energy_mean"].value
    increase, energy = nothing["kl_increase"], nothing["energy"]
    assert nothing["kl_per_energy"].value == pytest.approx(increase.value / energy.value)
