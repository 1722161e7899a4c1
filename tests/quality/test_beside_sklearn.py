"""Probes and pictures beside scikit-learn, which is not installed with us: skipped without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from analysis.report.plot.tsne import draw_tsne, embedded
from harness.errors import UserError
from harness.quality.logistic import cross_entropy, fit, logistic
from harness.quality.sparse_probes import accuracy_of


def data(rows: int = 600) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(rows, generator=generator) < 0.4
    x = torch.randn(rows, 30, generator=generator).relu()
    x[:, 4] += 0.8 * y
    x[:, 9] += 0.5 * ~y
    return x, y


def test_regressions_are_those_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = data()
    theirs = linear.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
    ours = logistic(x, y, 1 / len(x))
    assert ours[:-1].tolist() == pytest.approx(theirs.coef_[0].tolist(), abs=5e-4)
    assert float(ours[-1]) == pytest.approx(float(theirs.intercept_[0]), abs=5e-4)
    alone = linear.LogisticRegression(C=1e12, tol=1e-10, max_iter=10_000).fit(x[:, 4:5].numpy(), y.numpy())
    p = alone.predict_proba(x[:, 4:5].numpy())[np.arange(len(y)), y.long().numpy()]
    probe = fit(x[:, 4:5], y, ridge=0.0)
    assert float(cross_entropy(probe, x[:, 4:5], y)) == pytest.approx(float(-np.log(p).mean()), abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_sparse_probes_are_those_of_saebench(k: int) -> None:
    """Its rule, with scikit-learn's regression: latents by the difference of class means, C = 1, accuracy."""
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = data()
    train = torch.arange(len(y)) % 2 == 0
    a, b = x[train].numpy(), y[train].numpy()
    chosen = np.abs(a[b].mean(axis=0) - a[~b].mean(axis=0)).argsort()[-k:]
    theirs = linear.LogisticRegression(C=1.0, max_iter=1000).fit(a[:, chosen], b)
    score = theirs.score(x[~train].numpy()[:, chosen], y[~train].numpy())
    assert accuracy_of(x, y, train, k) == pytest.approx(score, abs=0.004)


def test_a_picture_keeps_clusters_apart() -> None:
    pytest.importorskip("sklearn.manifold")
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((3, 20)) * 5
    groups = np.repeat(np.arange(3.0), 60)
    rows = centres[groups.astype(int)] + generator.standard_normal((180, 20))
    points = embedded(rows)
    middle = np.array([points[groups == name].mean(axis=0) for name in range(3)])
    nearest = np.linalg.norm(points[:, None] - middle, axis=2).argmin(axis=1)
    assert (nearest == groups).mean() > 0.98
    ax = Figure().subplots()
    draw_tsne(ax, rows, groups, most=90)
    assert np.asarray(ax.collections[0].get_offsets()).shape == (90, 2)


def test_without_scikit_learn_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        embedded(np.eye(5))
