"""Pictures as functions on `Axes`: each draws into the axes it is given and returns them.

No global settings are touched and nothing is shown. Colours are viridis (readable with every kind of colour vision, and
ordered by lightness, so also in black and white); each value of k has its own marker besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from analysis.frames import Frame, pd
from analysis.learning_rate import BestRates
from analysis.result import FitResult
from analysis.table import RunTable

MARKERS = "osD^vP*X<>"
GREY = "0.6"
WIDTH = 5.0
"""Inches: wide enough for a column, narrow enough that its letters can be read on a phone."""


def figure(height: float = 3.9, width: float = WIDTH) -> Figure:
    """An empty figure that belongs to no window."""
    return Figure(figsize=(width, height), layout="constrained")


def k_style(levels: Sequence[float], value: float) -> dict[str, Any]:
    """Colour and marker of one k among all k of a picture."""
    order = sorted(levels)
    i = order.index(value)
    share = i / max(len(order) - 1, 1)
    return {"color": colormaps["viridis"](0.82 * share), "marker": MARKERS[i % len(MARKERS)]}


def log_axes(ax: Axes, x: str, y: str, x_values: np.ndarray | None = None, powers_of_two: bool = False) -> Axes:
    """Log-log axes with plain numbers, a light grid and no box."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(True, which="major", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    if powers_of_two and x_values is not None and len(x_values):
        ticks = np.unique(x_values)
        while len(ticks) > 7:
            ticks = ticks[::2]
        ax.set_xticks(ticks, [f"{tick:,.0f}" if tick < 1e5 else f"2^{np.log2(tick):.0f}" for tick in ticks])
        ax.xaxis.set_minor_locator(NullLocator())
    plain_log_ticks(ax)
    return ax


def add_legend(ax: Axes, ncols: int = 1) -> None:
    """A legend without a box, where there is anything to name."""
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=8.5, ncols=ncols)


def plain_log_ticks(ax: Axes) -> None:
    """Numbers like 0.2 instead of 2×10⁻¹ on the y axis, dense enough for a range below one decade."""
    low, high = ax.get_ylim()
    decades = np.log10(high / low) if low > 0 else 2
    subs = (
        (1, 2, 5) if decades > 0.8 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8) if decades > 0.3 else tuple(np.arange(1, 10, 0.5))
    )
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_locator(NullLocator())


def loss_against_n(ax: Axes, table: RunTable, fits: Sequence[FitResult | tuple[float, FitResult]] = ()) -> Axes:
    """Loss against n, one series per k, with the fitted law, its band and its floors.

    Args:
        fits: A fit of a law in n and k, or (k, fit) pairs of laws in n alone.
    """
    n, k, loss = table.values("n"), table.values("k"), table.values("loss")
    levels = sorted(set(k))
    for value in levels:
        style = k_style(levels, value)
        chosen = k == value
        ax.plot(n[chosen], loss[chosen], linestyle="none", ms=5.5, label=f"k = {value:g}", zorder=3, **style)
    grid = np.geomspace(n.min() / 1.1, n.max() * 1.1, 80) if len(n) else np.array([])
    for entry in fits:
        pairs = [entry] if isinstance(entry, tuple) else [(value, entry) for value in levels]
        for value, result in pairs:
            color = k_style(levels, value)["color"]
            inputs = {"n": grid, "x": grid, "k": np.full(len(grid), value)}
            band = result.predict({name: inputs[name] for name in result.law.inputs})
            ax.plot(grid, band["value"], color=color, lw=1.4)
            if np.all(np.isfinite(band["hi"])) and result.dof > 0:
                ax.fill_between(grid, band["lo"], band["hi"], color=color, alpha=0.18, lw=0)
            floor = result.floor({name: inputs[name] for name in result.law.inputs})
            if "floor_not_identified" not in {x.code for x in result.notes} and floor[0] > 0.1 * band["value"].min():
                ax.plot(grid, floor, color=color, lw=1.1, ls=":")
    _excluded(ax, table)
    log_axes(ax, "number of latents n", "held-out fvu", n, powers_of_two=True)
    add_legend(ax, ncols=min(3, max(len(levels), 1)))
    return ax


def _excluded(ax: Axes, table: RunTable) -> None:
    """Left-out runs with known n and loss as grey crosses."""
    out = table.excluded
    columns = [table.roles[role] for role in ("n", "loss")]
    if not len(out) or not set(columns) <= set(out):
        return
    x, y = (pd.to_numeric(out[column], errors="coerce").astype(float) for column in columns)
    usable = (x > 0) & (y > 0) & np.isfinite(y)
    same = out["sae"].isin(table.frame["sae"].unique()) if "sae" in out and "sae" in table.frame else True
    usable = usable & same
    if usable.any():
        ax.plot(x[usable], y[usable], "x", color=GREY, ms=6, label="left out")


def residuals_against_n(ax: Axes, table: RunTable, fits: Sequence[FitResult | tuple[float, FitResult]]) -> Axes:
    """Residuals of ln(loss) in per cent against n."""
    n, k, loss = table.values("n"), table.values("k"), table.values("loss")
    levels = sorted(set(k))
    for entry in fits:
        for value in [entry[0]] if isinstance(entry, tuple) else levels:
            result = entry[1] if isinstance(entry, tuple) else entry
            chosen = k == value
            inputs = {"n": n[chosen], "x": n[chosen], "k": k[chosen]}
            fitted = result.log_value({name: inputs[name] for name in result.law.inputs})
            style = k_style(levels, value)
            shift = 1.03 ** (levels.index(value) - (len(levels) - 1) / 2)
            ax.plot(n[chosen] * shift, 100 * (np.log(loss[chosen]) - fitted), linestyle="none", ms=4.5, **style)
    ax.axhline(0, color="0.4", lw=0.9)
    reach = max(abs(edge) for edge in ax.get_ylim())
    ax.set_ylim(-reach, reach)
    ax.set_ylabel("residual [%]")
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def loss_against_flops(ax: Axes, table: RunTable, curves: Frame, front: Frame, fit: FitResult | None = None) -> Axes:
    """Training curves in grey, final points by k, the frontier over all of them, and its fitted law."""
    for _, part in curves[curves["constant_lr"].astype(bool)].groupby("run"):
        if len(part) > 1:
            part = part.sort_values("flops")
            ax.plot(part["flops"], part["loss"], color="0.82", lw=0.9, zorder=1)
    levels = sorted(set(table.values("k")))
    hollow = (table.frame["sae"] == "switch").to_numpy() if "sae" in table.frame else np.zeros(len(table), bool)
    for value in levels:
        style = k_style(levels, value)
        for switch in (False, True):
            chosen = (table.values("k") == value) & (hollow == switch)
            if chosen.any():
                ax.plot(
                    table.values("flops")[chosen],
                    table.values("loss")[chosen],
                    linestyle="none",
                    ms=5.5,
                    mfc="white" if switch else style["color"],
                    label=None if switch else f"k = {value:g}",
                    zorder=3,
                    **style,
                )
    if len(front) > 1:
        ax.step(front["flops"], front["loss"], where="post", color="black", lw=1.4, label="frontier", zorder=2)
    if fit is not None:
        x = np.geomspace(front["flops"].min(), front["flops"].max(), 60)
        ax.plot(x, fit.value({"x": x}), color="#d55e00", lw=1.3, ls="--", label="fit of the frontier", zorder=2)
    if hollow.any():
        ax.plot([], [], "o", mfc="white", mec="0.3", label="hollow: Switch")
    log_axes(ax, "training FLOPs", "held-out fvu")
    add_legend(ax, ncols=2)
    return ax


def architectures(ax: Axes, table: RunTable, k: float, x: str, legend: bool = True) -> Axes:
    """Loss of each architecture at one k against n or FLOPs (`x` is the role)."""
    part = table.frame[table.values("k") == k]
    lines = ("-", "--", ":", "-.")
    for i, (name, group) in enumerate(_populations(part)):
        means = group.groupby(table.roles["n"])[[table.roles[x], table.roles["loss"]]].mean()
        color = colormaps["viridis"]((0.0, 0.55, 0.8, 0.3)[i % 4])
        ax.plot(
            means[table.roles[x]],
            means[table.roles["loss"]],
            ls=lines[i % 4],
            marker="os^D"[i % 4],
            mfc=color if i == 0 else "white",
            color=color,
            ms=5,
            lw=1.3,
            label=name,
        )
    label = "number of latents n" if x == "n" else "training FLOPs"
    log_axes(ax, label, "held-out fvu", part[table.roles["n"]].to_numpy(), powers_of_two=x == "n")
    ax.set_title(f"k = {k:g}", fontsize=10, loc="left")
    if legend:
        add_legend(ax)
    return ax


def _populations(frame: Frame) -> list[tuple[str, Frame]]:
    """(name, rows) of every architecture and number of experts, TopK first."""
    keys = [name for name in ("sae", "n_experts") if name in frame]
    if not keys:
        return [("runs", frame)]
    groups = []
    for key, part in frame.groupby(keys, dropna=False):
        sae, *experts = key if isinstance(key, tuple) else (key,)
        name = (
            "TopK" if sae == "topk" else f"Switch, {experts[0]:g} experts" if sae == "switch" and experts else str(sae)
        )
        groups.append((name, part))
    return sorted(groups, key=lambda group: (group[0] != "TopK", group[0]))


def dead_latents(ax: Axes, table: RunTable) -> Axes:
    """Share of dead latents against n by k; hollow markers are Switch."""
    part = table.frame[pd.to_numeric(table.frame[table.roles["dead"]], errors="coerce").notna()]
    levels = sorted(set(table.values("k")))
    for value in levels:
        style = k_style(levels, value)
        for name, group in _populations(part[part[table.roles["k"]] == value]):
            means = group.groupby(table.roles["n"])[table.roles["dead"]].mean() * 100
            first = name in ("TopK", "runs")
            ax.plot(
                means.index,
                means.to_numpy(),
                ls="-" if first else "--",
                mfc=style["color"] if first else "white",
                lw=1.1,
                ms=5,
                label=f"k = {value:g}" if first else None,
                **style,
            )
    log_axes(ax, "number of latents n", "dead latents [%]", part[table.roles["n"]].to_numpy(), powers_of_two=True)
    ax.set_yscale("linear")
    ax.set_ylim(bottom=0)
    if len(_populations(part)) > 1:
        ax.plot([], [], "o--", mfc="white", color="0.3", ms=5, label="hollow: Switch")
    add_legend(ax)
    return ax


def best_learning_rates(ax: Axes, found: BestRates) -> Axes:
    """Best learning rate against n by k, with its fitted power law; hollow where it is at the edge of those tried."""
    rates = found.rates
    levels = sorted(set(rates["k"]))
    for value in levels:
        style = k_style(levels, value)
        for inside in (True, False):
            part = rates[(rates["k"] == value) & (rates["bracketed"].astype(bool) == inside)]
            face = style["color"] if inside else "white"
            label = f"k = {value:g}" if inside or not rates[rates["k"] == value]["bracketed"].any() else None
            if len(part):
                ax.plot(part["n"], part["lr"], linestyle="none", ms=5.5, mfc=face, label=label, **style)
    if found.law is not None:
        x = np.geomspace(rates["n"].min(), rates["n"].max(), 30)
        ax.plot(x, found.law.value({"n": x}), color="0.3", lw=1.2, label=f"n^{found.law.values['p']:.2f}")
    log_axes(ax, "number of latents n", "best learning rate", rates["n"].to_numpy(), powers_of_two=True)
    add_legend(ax)
    return ax


def show(picture: Figure) -> None:
    """Show a figure in a notebook."""
    import io

    from IPython.display import SVG, display

    buffer = io.BytesIO()
    picture.savefig(buffer, format="svg")
    display(SVG(buffer.getvalue()))
