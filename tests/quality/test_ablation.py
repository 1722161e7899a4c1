"""Ablation sparsity on changes whose value is known, and on a tiny model."""

from __future__ import annotations

import math

import pytest
import torch

from harness.quality.ablation import chosen_places, contributions, judge, sparsity
from harness.quality.shared import Shared
from tests.quality.planted import orthonormal, planted


def test_known_changes() -> None:
    one = torch.zeros(1, 1, 1000)
    one[0, 0, 3] = 5.0
    assert float(sparsity(one)) == pytest.approx(1 / 1000)
    gaussian = torch.randn(1, 4, 50_000, generator=torch.Generator().manual_seed(0))
    assert float(sparsity(gaussian)) == pytest.approx(2 / math.pi, abs=0.01)
    # a shift of a whole row changes no probability
    shifted = gaussian + torch.tensor([1.0, -2.0, 3.0, 4.0])[None, :, None]
    assert float(sparsity(shifted)) == pytest.approx(float(sparsity(gaussian)), rel=1e-4)
    assert sparsity(torch.full((1, 2, 9), 3.0)).isnan().all()


def test_contributions_add_up_to_the_reconstruction() -> None:
    D = orthonormal(16)
    sae = planted(D, k=4, scale=2.5, b_dec=torch.ones(16))
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([part.sum(dim=0) for part in contributions(sae, x)])
    torch.testing.assert_close(parts + 2.5, sae.forward(x))


def test_a_tiny_model(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.quality.ablation.LATER", 4)
    monkeypatch.setattr("harness.quality.ablation.TOKENS", 6)
    places = chosen_places(shared)
    assert len(places) == 6 and all(shared.text.kept[place] for place in places)
    values = judge(planted(orthonormal(16), k=3), shared).values
    for name in ("sparsity", "sparsity_random", "sparsity_channels"):
        assert 0 < values[name].value <= 1 and values[name].se is not None
