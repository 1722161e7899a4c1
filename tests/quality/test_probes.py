"""Probes: Newton equals scipy, a planted latent wins, chance gives chance."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from harness.config import ActivationsConfig
from harness.process.signals import StopFlag
from harness.progress import Progress
from harness.quality import probes
from harness.quality.labels import token_labels
from harness.quality.logistic import cross_entropy, fit, fit_all, logistic, loss_of
from harness.quality.probes import Tasks, best_of, controls, judge, random_losses
from harness.quality.shared import Shared
from tests.quality.planted import planted


def data(tokens: int = 1600) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(tokens, generator=generator) < 0.3
    z = torch.randn(tokens, 40, generator=generator)
    z[:, 7] = 1.5 * y + 0.8 * torch.randn(tokens, generator=generator)
    return z, y


def halves(z: torch.Tensor, y: torch.Tensor) -> Tasks:
    document = torch.arange(len(z)) // 10
    return Tasks(z, document % 2 == 0, {"planted": y})


def test_newton_equals_scipy() -> None:
    z, y = data()
    probe = fit(z[:, 7:8], y, ridge=0.0)
    signs = np.where(y.numpy(), 1.0, -1.0)
    column = z[:, 7].double().numpy()
    exact = minimize(lambda p: np.logaddexp(0, -signs * (p[0] * column + p[1])).mean(), [0.0, 0.0], tol=1e-12)
    assert [float(probe.weight), float(probe.bias)] == pytest.approx(exact.x.tolist(), abs=1e-3)
    assert float(cross_entropy(probe, z[:, 7:8], y)) == pytest.approx(exact.fun, abs=1e-6)


def test_a_regression_on_all_channels_equals_scipy() -> None:
    """scikit-learn's C = 1 is a ridge of 1/rows; the bias is free."""
    z, y = data(400)
    x, signs = z[:, :8].double().numpy() * 2 + 1, np.where(y.numpy(), 1.0, -1.0)

    def loss(p: np.ndarray) -> float:
        return np.logaddexp(0, -signs * (x @ p[:-1] + p[-1])).mean() + (p[:-1] ** 2).sum() / 2 / len(x)

    exact = minimize(loss, np.zeros(9), tol=1e-12)
    assert logistic(torch.from_numpy(x), y, 1 / len(x)).tolist() == pytest.approx(exact.x.tolist(), abs=1e-4)


def test_a_regression_on_separable_rows_ends() -> None:
    x = torch.linspace(-1, 1, 50)[:, None]
    weight = logistic(x, x[:, 0] > 0, 1e-6)
    assert weight.isfinite().all() and loss_of(x.double()[:, 0] * weight[0] + weight[1], x[:, 0] > 0) < 0.05


def test_a_probe_on_all_channels_is_no_worse_than_the_constant_on_noise() -> None:
    """As many channels as rows: without a ridge that is chosen, it would learn the noise."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 200, generator=generator), torch.rand(400, generator=generator) < 0.5
    assert loss_of(fit_all(x[:200], y[:200])(x[200:]), y[200:]) < math.log(2) + 0.15


def test_signs_and_affine_changes_do_not_matter() -> None:
    z, y = data()
    column = z[:, 7:8]
    losses = [float(cross_entropy(fit(v, y), v, y)) for v in (column, -column, 50 * column + 1000)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_planted_latent_wins() -> None:
    z, y = data()
    latent, loss = best_of(lambda x, latents: x[:, latents], 40, halves(z, y))["planted"]
    assert latent == 7 and loss < 0.45


def test_a_latent_that_is_the_label() -> None:
    z, y = data()
    z[:, 3] = y.float()
    assert best_of(lambda x, latents: x[:, latents], 40, halves(z, y))["planted"][1] < 0.1


def test_random_labels_are_not_learned() -> None:
    """The smallest of many training losses is below H(y); on other documents it is not."""
    z, _ = data(3200)
    y = torch.rand(3200, generator=torch.Generator().manual_seed(5)) < 0.5
    _, loss = best_of(lambda x, latents: x[:, latents], 40, halves(z, y))["planted"]
    assert loss >= math.log(2) - 0.002


def test_controls_and_values() -> None:
    z, y = data()
    part = halves(z, y)
    beside = controls([part]) | {"random": random_losses([part], 64)}
    share = float(y[part.train].float().mean())
    assert beside["constant"]["planted"] == pytest.approx(
        -(share * math.log(share) + (1 - share) * math.log(1 - share)), abs=0.02
    )
    assert beside["full"]["planted"] < beside["constant"]["planted"]
    W = torch.eye(40)
    outcome = judge(planted(W, k=4), [part], beside, {})
    assert outcome.curves["labels"][0]["latent"] == 7
    assert outcome.values["loss"].value == pytest.approx(beside["channel"]["planted"], abs=1e-3)
    assert outcome.values["loss_shuffled"].value > outcome.values["loss"].value + 0.1


def test_what_needs_no_sae_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = halves(*data())
    other = part._replace(train=~part.train)
    expected, random = controls([part]), random_losses([part], 64)
    calls: list[str] = []

    def counted(*arguments: Any) -> Any:
        calls.append("controls")
        return controls(*arguments)

    monkeypatch.setattr(probes, "controls", counted)
    shared = Shared(ActivationsConfig(kind="synthetic"), tmp_path, 64, StopFlag(), Progress(io.StringIO()))
    for _ in range(2):
        beside = probes.Beside(shared, [part], {})
        assert (beside.losses, beside.random(64), beside.of_channels) == (expected, random, {})
    assert len(calls) == 1
    assert probes.Beside(shared, [other], {}).losses != expected and len(calls) == 2


class Words:
    texts = ("def", " running", "(", "x", ")", "#", " note", "\n", "Big", "'", "s", "'", "3")

    def decode(self, ids: list[int]) -> str:
        return self.texts[ids[0]]


def test_labels() -> None:
    labels = token_labels(torch.arange(13)[None], Words())
    assert len(labels) >= 13

    def where(name: str) -> list[int]:
        return labels[name][0].nonzero().flatten().tolist()

    assert where("code keyword") == [0] and where("ends in ing") == [1] and where("digit") == [12]
    assert where("in parentheses") == [2, 3] and where("in a comment") == [5, 6] and where("in quotes") == [9, 10]
    assert where("capitalised") == [8] and where("after a line break") == [8] and where("begins a word") == [1, 6]
