"""A picture of a dictionary: its rows in two dimensions, coloured by expert."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes

from analysis.laws.law import Array
from harness.errors import UserError

DIMENSIONS = 50
"""Principal components that are embedded."""
PERPLEXITY = 50.0


def embedded(rows: Array, seed: int = 0) -> Array:
    """Rows (n, d) → points (n, 2), by t-SNE of the first principal components of the normalised rows.

    Needs scikit-learn, which is not installed with us: raises `UserError` without it, and for fewer than three rows.
    """
    try:
        from sklearn.manifold import TSNE  # pyright: ignore
    except ImportError:
        raise UserError("a t-SNE picture needs scikit-learn: pip install scikit-learn") from None
    if len(rows) < 3:
        raise UserError(f"a t-SNE picture needs three rows or more, not {len(rows)}")
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    centred = unit - unit.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    components = centred @ directions[:, ::-1][:, :DIMENSIONS]
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    settings: dict[str, Any] = {"learning_rate": 100.0, "init": "pca", "random_state": seed}
    return np.asarray(TSNE(perplexity=perplexity, **settings).fit_transform(components))


def draw_tsne(ax: Axes, rows: Array, groups: Array, most: int = 8000, seed: int = 0) -> None:
    """Draw rows (n, d) by t-SNE, coloured by their group (n,): at most `most`, as many of each group.

    Distances between clusters mean little; `quality.geometry.expert_purity` is the number to read beside it. Raises
    `UserError` as `embedded`.
    """
    generator = np.random.default_rng(seed)
    names = np.unique(groups)
    each = max(1, most // len(names))
    members = (generator.permutation(np.flatnonzero(groups == name))[:each] for name in names)
    chosen = np.sort(np.concatenate(list(members)))
    x, y = embedded(rows[chosen], seed).T
    ax.scatter(x, y, c=np.searchsorted(names, groups[chosen]), cmap="tab20", s=2, linewidths=0)
    ax.set_xticks([])
    ax.set_yticks([])
