"""Pictures along compute: training curves and their frontier, IsoFLOP profiles and their minima."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from analysis.fits.result import FitResult
from analysis.questions.isoflop import IsoFlop
from analysis.report.plot.style import add_legend, hollow_label, k_style, log_axes
from analysis.runs.axes import axis_words
from analysis.runs.table import RunTable


def loss_against_flops(
    ax: Axes, table: RunTable, curves: pd.DataFrame, front: pd.DataFrame, fit: FitResult | None = None
) -> Axes:
    """Training curves in grey, final points by k (hollow: not TopK), the frontier over all of them, and its fitted
    law."""
    for _, part in curves[curves["constant_lr"].astype(bool)].groupby("run"):
        if len(part) > 1:
            part = part.sort_values("flops")
            ax.plot(part["flops"], part["loss"], color="0.82", lw=0.9, zorder=1)
    levels = sorted(set(table.values("k")))
    names = table.frame["sae"] if "sae" in table.frame else pd.Series("topk", table.frame.index)
    hollow = (names != "topk").to_numpy()
    if hollow.all():
        hollow = ~hollow
    for value in levels:
        style = k_style(levels, value)
        for other in (False, True):
            chosen = (table.values("k") == value) & (hollow == other)
            if chosen.any():
                ax.plot(
                    table.values("flops")[chosen],
                    table.values("loss")[chosen],
                    linestyle="none",
                    ms=5.5,
                    mfc="white" if other else style["color"],
                    label=None if other else f"k = {value:g}",
                    zorder=3,
                    **style,
                )
    if len(front) > 1:
        ax.step(front["flops"], front["loss"], where="post", color="black", lw=1.4, label="frontier", zorder=2)
    if fit is not None:
        x = np.geomspace(front["flops"].min(), front["flops"].max(), 60)
        ax.plot(x, fit.value({"x": x}), color="#d55e00", lw=1.3, ls="--", label="fit of the frontier", zorder=2)
    if hollow.any():
        ax.plot([], [], "o", mfc="white", mec="0.3", label=hollow_label(names))
    log_axes(ax, axis_words(table.roles), "held-out fvu")
    add_legend(ax, ncols=3, below=names.nunique() > 2)
    return ax


def isoflop_profiles(ax: Axes, isoflop: IsoFlop) -> Axes:
    """Loss against n at each budget, with the minimum as a star, hollow if the sizes do not bracket it."""
    budgets = sorted(set(isoflop.profiles["flops"]))
    for i, budget in enumerate(budgets):
        color = colormaps["viridis"](0.82 * i / max(len(budgets) - 1, 1))
        part = isoflop.profiles[isoflop.profiles["flops"] == budget].groupby("n", as_index=False)["loss"].mean()
        named = f"{budget:.2g} FLOPs" if len(budgets) <= 4 or i in (0, len(budgets) - 1) else None
        ax.plot(part["n"], part["loss"], "o-", color=color, ms=3, lw=1.1, label=named)
    for _, row in isoflop.minima.iterrows():
        face = "#d55e00" if row["bracketed"] else "white"
        ax.plot(row["n"], row["loss"], "*", ms=11, mfc=face, mec="black", mew=0.8, zorder=4)
    sizes = isoflop.profiles["n"].to_numpy()
    log_axes(ax, "number of latents n", "held-out loss", sizes, powers_of_two=True)
    add_legend(ax)
    return ax


def isoflop_minima(ax: Axes, isoflop: IsoFlop) -> Axes:
    """The best n against the budget, hollow if it is not bracketed, and its power law."""
    for bracketed in (True, False):
        part = isoflop.minima[isoflop.minima["bracketed"].astype(bool) == bracketed]
        face, name = ("#d55e00", "best n") if bracketed else ("white", "at the edge of the sizes")
        if len(part):
            ax.plot(part["flops"], part["n"], "*", ls="none", ms=11, mfc=face, mec="black", mew=0.8, label=name)
    if isoflop.law is not None:
        x = np.geomspace(isoflop.minima["flops"].min(), isoflop.minima["flops"].max(), 30)
        band = isoflop.law.predict({"n": x})
        if np.all(np.isfinite(band["hi"])):
            ax.fill_between(x, band["lo"], band["hi"], color="0.5", alpha=0.25, lw=0)
        ax.plot(x, band["value"], color="black", lw=1.2, ls="--", label=f"C^{isoflop.law.values['p']:.2f}")
    log_axes(ax, "training FLOPs", "best number of latents")
    add_legend(ax)
    return ax
