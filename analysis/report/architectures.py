"""The report's part about architectures at equal sparsity: rows, sentences, picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.format import number
from analysis.questions.sparsity import Frontier, at_equal_l0, frontiers, order
from analysis.report import plot
from analysis.report.plot.style import add_legend, architecture_style, encode, log_axes

if TYPE_CHECKING:
    from analysis.report.findings import Findings

FEW = 3
"""Up to two architectures the report has tables of its own (TopK against Switch)."""

_AT = {"n": "at equal n and L0", "flops": "at equal training FLOPs and L0"}


def architecture_rows(findings: Findings) -> list[dict[str, Any]]:
    """Every cell of another architecture beside TopK; empty unless the sweep has several architectures."""
    if len({frontier.architecture for frontier in frontiers(findings.shown)}) < FEW:
        return []
    return [
        {
            "sae": row["sae"],
            "n": number(row["n"]),
            "l0": f"{row['l0']:.1f}",
            "loss": f"{row['loss']:.4f}",
            **{f"{name}_ratio": _with_ends(row[f"ratio_{name}"], row[f"ends_{name}"]) for name in _AT},
        }
        for row in at_equal_l0(findings.shown, findings.paired)
    ]


def _with_ends(ratio: float | None, ends: tuple[float, float] | None) -> str:
    if ratio is None:
        return "outside TopK's range"
    return f"{ratio:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def architecture_sentences(findings: Findings) -> list[str]:
    """The order of the architectures, with intervals; empty unless the sweep has several."""
    if not architecture_rows(findings):
        return []
    rows, sentences = at_equal_l0(findings.shown, findings.paired), []
    for name, words in _AT.items():
        found = order(rows, name, findings.paired)
        if found:
            parts = [f"{row['sae']} {_with_ends(row['ratio'], row['ends'])} ({row['cells']} cells)" for row in found]
            sentences.append(f"fvu over that of TopK {words}, mean of the cells: {'; '.join(parts)}.")
    return sentences


def frontier_picture(findings: Findings) -> dict[str, str] | None:
    """fvu against measured L0, a panel per n."""
    every = frontiers(findings.shown) if architecture_rows(findings) else []
    widths = sorted({frontier.n for frontier in every})[:4]
    if not widths:
        return None
    names = sorted({frontier.architecture for frontier in every}, key=lambda name: (name != "topk", name))
    figure = plot.figure(1.4 + 3.0 * len(widths))
    axes = np.atleast_1d(figure.subplots(len(widths), 1, sharex=True))
    for ax, n in zip(axes, widths, strict=True):
        for place, name in enumerate(names):
            for frontier in (each for each in every if (each.n, each.architecture) == (n, name)):
                l0, loss = _curve(frontier)
                ax.plot(l0, loss, label=name, **architecture_style(place, len(names)))
        shown = np.concatenate([_curve(frontier)[0] for frontier in every if frontier.n == n])
        log_axes(ax, "active latents per token, held-out (L0)", "held-out fvu", shown)
        ax.set_title(f"n = {n:g}", fontsize=10, loc="left")
    add_legend(axes[0], ncols=3, below=True)
    title = "Architectures at equal sparsity"
    caption = "Each at its best learning rate, seeds averaged. L0 was measured on held-out rows. Lower is better."
    return {"src": encode(figure), "title": title, "caption": caption, "alt": f"{title}, one panel for each n"}


def _curve(frontier: Frontier) -> tuple[list[float], list[float]]:
    points = frontier.points
    return [math.exp(point.log_l0) for point in points], [math.exp(point.log_loss) for point in points]
