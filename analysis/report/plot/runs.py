"""Pictures of runs: architectures side by side, dead latents, learning rates, tokens to convergence."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from analysis.questions.convergence import Convergence
from analysis.questions.learning_rate import BestRates
from analysis.report.plot.style import LINES, add_legend, architecture_style, hollow_label, k_style, log_axes
from analysis.runs.axes import axis_words
from analysis.runs.table import RunTable


def architectures(ax: Axes, table: RunTable, k: float, x: str, legend: bool = True) -> Axes:
    """Loss of each architecture at one k against n or FLOPs (`x` is the role)."""
    part = table.frame[table.values("k") == k]
    for i, (name, group) in enumerate(_populations(part)):
        means = group.groupby(table.roles["n"])[[table.roles[x], table.roles["loss"]]].mean()
        color = colormaps["viridis"]((0.0, 0.55, 0.8, 0.3)[i % 4])
        ax.plot(
            means[table.roles[x]],
            means[table.roles["loss"]],
            ls=LINES[i % 4],
            marker="os^D"[i % 4],
            mfc=color if i == 0 else "white",
            color=color,
            ms=5,
            lw=1.3,
            label=name,
        )
    label = "number of latents n" if x == "n" else axis_words(table.roles)
    log_axes(ax, label, "held-out fvu", part[table.roles["n"]].to_numpy(), powers_of_two=x == "n")
    ax.set_title(f"k = {k:g}", fontsize=10, loc="left")
    if legend:
        add_legend(ax)
    return ax


def _populations(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
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
    return sorted(groups, key=lambda group: (group[0] != "TopK", group[0].lower()))


def dead_latents(ax: Axes, table: RunTable) -> Axes:
    """Share of dead latents against n by k; hollow markers are not TopK. Of more than two architectures only the middle
    k, a line each."""
    part = table.frame[pd.to_numeric(table.frame[table.roles["dead"]], errors="coerce").notna()]
    levels = sorted(set(table.values("k")))
    names = [name for name, _ in _populations(part)]
    many = len(names) > 2
    shown = [levels[len(levels) // 2]] if many else levels
    for value in shown:
        for name, group in _populations(part[part[table.roles["k"]] == value]):
            means = group.groupby(table.roles["n"])[table.roles["dead"]].mean() * 100
            if many:
                style = architecture_style(names.index(name), len(names))
                style["label"] = name
            else:
                style, first = k_style(levels, value), name in ("TopK", "runs")
                filled = {"ls": "-", "mfc": style["color"], "label": f"k = {value:g}"}
                style |= {"lw": 1.1, "ms": 5, **(filled if first else {"ls": "--", "mfc": "white"})}
            ax.plot(means.index, means.to_numpy(), **style)
    sizes = part[table.roles["n"]].to_numpy()
    log_axes(ax, "number of latents n", "dead latents [%]", sizes, powers_of_two=True, y_scale="linear")
    ax.set_ylim(bottom=0)
    if many:
        ax.set_title(f"k = {shown[0]:g}", fontsize=10, loc="left")
    if len(names) == 2:
        ax.plot([], [], "o--", mfc="white", color="0.3", ms=5, label=hollow_label(part.get("sae", ())))
    add_legend(ax, ncols=2 if many else 1, below=many)
    return ax


def best_learning_rates(ax: Axes, best: BestRates) -> Axes:
    """Best learning rate against n by k, with its fitted power law; hollow at the edge of the rates tried."""
    rates = best.rates
    levels = sorted(set(rates["k"]))
    for value in levels:
        style = k_style(levels, value)
        for inside in (True, False):
            part = rates[(rates["k"] == value) & (rates["bracketed"].astype(bool) == inside)]
            face = style["color"] if inside else "white"
            label = f"k = {value:g}" if inside or not rates[rates["k"] == value]["bracketed"].any() else None
            if len(part):
                ax.plot(part["n"], part["lr"], linestyle="none", ms=5.5, mfc=face, label=label, **style)
    if best.law is not None:
        x = np.geomspace(rates["n"].min(), rates["n"].max(), 30)
        ax.plot(x, best.law.value({"n": x}), color="0.3", lw=1.2, label=f"n^{best.law.values['p']:.2f}")
    log_axes(ax, "number of latents n", "best learning rate", rates["n"].to_numpy(), powers_of_two=True)
    add_legend(ax)
    return ax


def tokens_to_convergence(ax: Axes, convergence: Convergence) -> Axes:
    """Tokens to convergence against n by k, with D0·n^p and its band for each k."""
    table = convergence.table
    levels = sorted(set(table.values("k"))) if table.has("k") else [0.0]
    laws = {0.0 if k is None else k: law for k, law in convergence.laws}
    for value in levels:
        style = k_style(levels, value)
        chosen = table.values("k") == value if table.has("k") else np.ones(len(table), dtype=bool)
        n, law = table.values("n")[chosen], laws.get(value)
        name = f"k = {value:g}" if table.has("k") else None
        if law is not None:
            name = f"{name or 'runs'}: n^{law.values['p']:.2f}"
            x = np.geomspace(n.min(), n.max(), 30)
            band = law.predict({"n": x})
            ax.plot(x, band["value"], color=style["color"], lw=1.2)
            if np.all(np.isfinite(band["hi"])):
                ax.fill_between(x, band["lo"], band["hi"], color=style["color"], alpha=0.18, lw=0)
        ax.plot(n, table.values("loss")[chosen], ls="none", ms=5.5, label=name, zorder=3, **style)
    log_axes(ax, "number of latents n", "tokens to convergence", table.values("n"), powers_of_two=True)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.3g}M" if value >= 1e6 else f"{value / 1e3:.3g}k")
    add_legend(ax)
    return ax
