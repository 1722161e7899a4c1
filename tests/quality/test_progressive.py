"""Progressive codes of an orthonormal dictionary: fvu at k′ is the energy of what is cut off."""

from __future__ import annotations

import pytest
import torch

from harness.quality.progressive import judge
from tests.quality.planted import orthonormal, planted, rows, sparse


def test_fvu_is_the_tail_energy() -> None:
    D, a = orthonormal(32), sparse(256, 32, 6)
    x = a @ D
    outcome = judge(planted(D, k=4), rows(x), x)
    variance = float((x - x.mean(dim=0)).square().sum())
    tail = a.sort(dim=1, descending=True).values
    for point in outcome.curves["topk"]:
        exact = float(tail[:, point["k"] :].square().sum()) / variance
        assert point["fvu"] == pytest.approx(exact, abs=1e-6)
    assert outcome.curves["topk"][-1] == {"k": 16, "fvu": pytest.approx(0, abs=1e-9)}
    assert outcome.values["fvu_k"].value == pytest.approx(float(tail[:, 4:].square().sum()) / variance, abs=1e-6)
    assert outcome.values["best_k_over_k"].value >= 1.5


def test_a_fixed_threshold_has_the_wanted_l0() -> None:
    """At equal mean L0 a threshold drops the smallest activations of all rows, so its error is no larger."""
    D, a = orthonormal(32), sparse(512, 32, 6)
    outcome = judge(planted(D, k=4), rows(a @ D), a @ D)
    assert outcome.values["l0_threshold"].value == pytest.approx(4, abs=0.01)
    assert outcome.values["fvu_threshold"].value < outcome.values["fvu_k"].value


def test_no_threshold_keeps_every_positive_activation() -> None:
    """A ReLU SAE cut at its largest size equals itself."""
    D, a = orthonormal(32), sparse(64, 32, 6)
    sae = planted(D, architecture="relu")
    x = a @ D + 0.01 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    outcome = judge(sae, rows(x), x)
    variance = float((x - x.mean(dim=0)).square().sum())
    whole = float((x - sae.forward(x)).square().sum()) / variance
    assert outcome.values["fvu_4k"].value == pytest.approx(whole, abs=1e-6)
