"""The style of all pictures: sizes, colours and markers of k, axes, legends.

Colours are viridis, which is readable with every kind of colour vision and ordered by lightness, so also in black and
white. Each value of k has its own marker as well.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

MARKERS = "osD^vP*X<>"
LINES = ("-", "--", ":", "-.")
"""Of architectures or controls, in turn."""
GREY = "0.6"
WIDTH = 5.0
"""Inches: wide enough for a column, narrow enough to be read on a phone."""

TICKS = (
    (2.5, (1,)),
    (0.8, (1, 2, 5)),
    (0.3, (1, 1.5, 2, 3, 4, 5, 6, 7, 8)),
    (-np.inf, tuple(np.arange(1, 10, 0.5))),
)
"""(decades, multiples): an axis that spans more decades has ticks at these multiples of the powers of ten."""
LABEL = 0.19
"""Width of a label like 2.5×10¹¹ and its gap, as a share of the x axis."""


def figure(height: float = 3.9, width: float = WIDTH) -> Figure:
    """An empty figure without a window; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def k_style(levels: Sequence[float], value: float) -> dict[str, Any]:
    """Colour and marker of one k among all k of a picture."""
    order = sorted(levels)
    i = order.index(value)
    share = i / max(len(order) - 1, 1)
    return {"color": colormaps["viridis"](0.82 * share), "marker": MARKERS[i % len(MARKERS)]}


def k_bar(ax: Axes, levels: Sequence[float]) -> None:
    """A colour bar of k at the right of `ax`: one field per value, with its marker."""
    order = sorted(levels)
    if not order:
        return
    styles = [k_style(order, value) for value in order]
    colors = ListedColormap([style["color"] for style in styles])
    norm = BoundaryNorm(np.arange(len(order) + 1), len(order)) if len(order) > 1 else Normalize(0, 1)
    field = ScalarMappable(norm, colors)
    bar = ax.figure.colorbar(field, ax=ax, ticks=np.arange(len(order)) + 0.5, fraction=0.05, pad=0.02, aspect=16)
    bar.ax.set_yticklabels([f"{value:g}" for value in order])
    bar.ax.set_title("k", fontsize=10)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    for i, style in enumerate(styles):
        bar.ax.plot([0.5], [i + 0.5], style["marker"], color="white", mec="black", mew=0.6, ms=5, clip_on=False)


def log_axes(
    ax: Axes,
    x: str,
    y: str,
    x_values: np.ndarray | None = None,
    powers_of_two: bool = False,
    y_scale: Literal["log", "linear"] = "log",
) -> Axes:
    """Axes with a logarithmic abscissa, plain numbers, a light grid and no box."""
    ax.set_xscale("log")
    with warnings.catch_warnings():  # equal losses: matplotlib widens the axis and says so
        warnings.filterwarnings("ignore", "Attempting to set identical low and high", UserWarning)
        ax.set_yscale(y_scale)
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
    else:
        _few_decade_ticks(ax)
    if y_scale == "log":
        plain_log_ticks(ax.yaxis)
    return ax


def _few_decade_ticks(ax: Axes) -> None:
    """Numbers like 2×10¹¹ on the x axis, as many as do not overlap; powers of ten alone if it spans many."""
    low, high = np.log10(ax.get_xlim()) if ax.get_xlim()[0] > 0 else (0.0, 12.0)
    powers = np.arange(np.floor(low), high + 1)

    def ticks(multiples: Sequence[float]) -> np.ndarray:
        places = np.add.outer(powers, np.log10(multiples)).ravel()
        return places[(places >= low) & (places <= high)]

    room = [multiples for _, multiples in TICKS if (np.diff(ticks(multiples)) > LABEL * (high - low)).all()]
    multiples = max(room, key=lambda each: len(ticks(each)), default=(1,))
    locator = MaxNLocator(3) if len(ticks(multiples)) < 2 else LogLocator(subs=multiples, numticks=6)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(LogFormatterSciNotation(minor_thresholds=(np.inf, np.inf)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def add_legend(ax: Axes, ncols: int = 1, below: bool = False) -> None:
    """A legend without a box, if there are labels. `below`: under the figure instead of where the axes have most room,
    for pictures that are full."""
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    style = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.8, "fontsize": 8.5}
    if below:
        ax.figure.legend(handles, labels, loc="outside lower center", ncols=ncols, **style)
    else:
        ax.legend(ncols=ncols, **style)


def architecture_style(place: int, count: int) -> dict[str, Any]:
    """Line, marker and colour of one of `count` architectures."""
    color = colormaps["turbo"](place / max(1, count - 1))
    return {"ls": LINES[place % 4], "marker": "os^Dvx"[place % 6], "ms": 4, "lw": 1.2, "color": color}


def hollow_label(architectures: Iterable[str]) -> str:
    """What hollow markers stand for beside filled ones of TopK."""
    others = set(architectures) - {"topk"}
    return "hollow: Switch" if others == {"switch"} else "hollow: other architectures"


def plain_log_ticks(axis: Axis) -> None:
    """Numbers like 0.2 instead of 2×10⁻¹, dense enough for a range below one decade."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low) if low > 0 else 2
    subs = next(subs for least, subs in TICKS if decades > least)
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def show(picture: Figure) -> None:
    """Show a figure in a notebook."""
    import io

    from IPython.display import SVG, display

    buffer = io.BytesIO()
    picture.savefig(buffer, format="svg")
    display(SVG(buffer.getvalue()))


def encode(figure: Figure) -> str:
    """A figure as a data URI: vector graphics with letters as outlines, so that it needs no font."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
