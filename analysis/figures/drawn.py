"""A figure of a paper, drawn from our runs: a picture and the numbers in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.report.plot.style import add_legend, log_axes

COLORS = ("#440154", "#31688e", "#35b779", "#d0a010", "#b5367a", "#808080")
MARKERS = "os^DvP"


@dataclass(frozen=True)
class Drawn:
    """One figure."""

    name: str
    """Of its files, e.g. `figure_03`."""
    caption: str
    picture: Figure
    data: pd.DataFrame
    """Every point that is drawn."""


def save(figures: Sequence[Drawn], folder: Path) -> list[Path]:
    """Write each figure as SVG and its numbers as CSV; returns the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for drawn in figures:
        path = folder / f"{drawn.name}.svg"
        with rc_context({"svg.hashsalt": drawn.name}):  # else the names inside differ from call to call
            drawn.picture.savefig(path, metadata={"Date": None, "Creator": None})
        drawn.data.to_csv(folder / f"{drawn.name}.csv", index=False, float_format="%.6g")
        paths.append(path)
    return paths


def gallery(figures: Sequence[Drawn], folder: str) -> str:
    """The figures as Markdown, with their captions; `folder` is where a reader of the text finds them."""
    return "\n\n".join(f"![{d.caption}]({folder}/{d.name}.svg)\n\n*{d.caption}*" for d in figures)


def lines(ax: Axes, data: pd.DataFrame, x: str, y: str, by: str, names: Sequence[str], labels: Sequence[str]) -> None:
    """A line with markers per value of `by`, in the order of `names`; rows of equal x are averaged, log by log."""
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        part = data[data[by] == name]
        if len(part):
            means = part[y].map(math.log).groupby(part[x]).mean().map(math.exp)
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            ax.plot(means.index, means, ms=5, lw=1.3, label=label, color=color, marker=marker)


def finish(ax: Axes, x: str, y: str, title: str = "", ticks: Sequence[float] = ()) -> None:
    """Logarithmic axes with names, ticks at these x if there are any, a legend, and a title at the left."""
    log_axes(ax, x, y)
    if len(ticks):
        ax.set_xticks(list(ticks), [f"{tick:,.0f}" for tick in ticks])
        ax.minorticks_off()
    if title:
        ax.set_title(title, fontsize=10, loc="left")
    add_legend(ax)
