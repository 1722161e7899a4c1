"""Pictures of features, drawn on the axes that they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes


def histogram(ax: Axes, table: dict[str, Any], latent: int) -> None:
    """How often a latent is how active, with the median of its positive activations. `table`: `Subject.table`."""
    counts, largest = table["histogram"][latent], float(table["largest"][latent])
    edges = np.linspace(0, largest, len(counts) + 1)
    ax.stairs(counts, edges, fill=True)
    ax.axvline(float(table["quantiles"][latent][2]), color="black", lw=1, ls="--", label="median")
    ax.set_xlabel(f"activation of latent {latent}")
    ax.set_ylabel("tokens")
    ax.legend(frameon=False)


def densities(ax: Axes, table: dict[str, Any], label: str = "") -> None:
    """Distribution of the densities of the latents that were active, on a logarithmic axis."""
    density = table["density"][table["count"] > 0]
    bins = np.logspace(np.log10(density.min()), np.log10(density.max()) + 1e-6, 40) if len(density) else 10
    ax.hist(density, bins=bins, histtype="step", label=label)
    ax.set_xscale("log")
    ax.set_xlabel("share of tokens at which a latent is active")
    ax.set_ylabel("latents")


def expert_map(ax: Axes, cosines: Sequence[Sequence[float]]) -> None:
    """Mean over the rows of one expert (vertical) of the largest cosine with another row of each (horizontal)."""
    picture = ax.imshow(np.asarray(cosines), vmin=0, cmap="viridis")
    ax.set_xlabel("to expert")
    ax.set_ylabel("from expert")
    ax.figure.colorbar(picture, ax=ax, label="mean largest cosine")
