"""Refinement: the shift of ℓ1 is λ/2 exactly, TopK at its optimum has none, and NNLS equals scipy's."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls as scipy_nnls

from harness.quality.refinement import downstream_gain, judge, nnls, refined
from harness.quality.shared import Shared
from tests.quality.planted import orthonormal, planted, rows, sparse


def test_an_l1_penalty_shrinks_by_half_its_weight() -> None:
    """With orthonormal rows, ‖x − x̂‖² + λ‖f‖₁ is least at f = a − λ/2, which is what a bias of −λ/2 gives."""
    D, a, weight = orthonormal(16), sparse(64, 16, 3), 0.3
    x = a @ D
    sae = planted(D, architecture="relu", b_enc=torch.full((16,), -weight / 2))
    codes = sae.encode(x)
    shift = refined(sae, x, codes).values - codes.values
    torch.testing.assert_close(shift[codes.values > 0], torch.full((int((codes.values > 0).sum()),), weight / 2))
    values = judge(sae, rows(x)).values
    assert values["log_ratio"].value > 0.1 and values["fvu_after"].value < 1e-8 < values["fvu_before"].value


def test_topk_at_its_optimum_does_not_move() -> None:
    D, a = orthonormal(16), sparse(64, 16, 3)
    values = judge(planted(D, k=3), rows(a @ D)).values
    assert values["log_ratio"].value == pytest.approx(0, abs=1e-6)
    assert values["silenced"].value == 0


def test_nnls_equals_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    D = torch.nn.functional.normalize(torch.randn(40, 16, generator=generator), dim=1)
    index = torch.rand(20, 40, generator=generator).argsort(dim=1)[:, :6]
    target = torch.randn(20, 16, generator=generator)
    found = nnls(target, index, torch.ones(20, 6), D)
    for token in range(20):
        exact, _ = scipy_nnls(D[index[token]].T.double().numpy(), target[token].double().numpy())
        torch.testing.assert_close(found[token], torch.from_numpy(exact).float(), atol=1e-5, rtol=1e-4)


def test_the_support_is_kept() -> None:
    D = orthonormal(8)
    start = torch.tensor([[1.0, 0.0, 2.0]])
    found = nnls(D[:3].sum(dim=0, keepdim=True), torch.tensor([[0, 1, 2]]), start, D)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 1.0]]), atol=1e-6, rtol=0)


def test_losses_before_and_after(shared: Shared) -> None:
    """On orthonormal rows with a bias that shrinks, refinement brings back what the model loses."""
    shrinking = planted(orthonormal(16), architecture="relu", b_enc=torch.full((16,), -0.5))
    values = downstream_gain(shrinking, shared)
    assert 0 <= values["kl_after"].value < values["kl_before"].value
    assert values["kl_gain"].value == pytest.approx(values["kl_before"].value - values["kl_after"].value)
    gain = values["delta_ce_before"].value - values["delta_ce_after"].value
    assert values["delta_ce_gain"].value == pytest.approx(gain, abs=1e-9)
    kept = downstream_gain(planted(orthonormal(16), k=16), shared)
    assert kept["kl_gain"].value == pytest.approx(0, abs=1e-5)
