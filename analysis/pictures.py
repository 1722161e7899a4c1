"""The pictures of a report as inline SVG (base64), each with its title, caption and a text for those who cannot see."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from analysis import plot
from analysis.frames import Frame, pd
from analysis.result import FitResult
from analysis.words import interval, number

if TYPE_CHECKING:
    from analysis.report import Findings


def all_pictures(findings: Findings) -> list[dict[str, str]]:
    """Every picture that the data of a sweep allow: title, caption, alt, src."""
    if not len(findings.table):
        return []
    makers = (_loss_n, _loss_flops, _versus_n, _versus_flops, _dead, _rates)
    return [picture for maker in makers if (picture := maker(findings)) is not None]


def encode(figure: Figure) -> str:
    """A figure as a data URI: vector graphics with its letters as outlines, so that it needs no font."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(figure: Figure, title: str, caption: str, alt: str) -> dict[str, str]:
    return {"src": encode(figure), "title": title, "caption": caption, "alt": alt}


def _loss_n(findings: Findings) -> dict[str, str]:
    main = findings.main
    pairs: list[Any] = [result if k is None else (k, result) for k, result in findings.fits]
    figure = plot.figure(5.4 if pairs else 3.9)
    if pairs:
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
        plot.loss_against_n(upper, main, pairs)
        upper.set_xlabel("")
        plot.residuals_against_n(lower, main, pairs)
        lower.set_xlabel("number of latents n")
        what = f"Lines: {_names([result for _, result in findings.fits])}, with the 95 % band of the mean."
        floor = " Dotted: its floor." if any(result.law.floor is not None for _, result in findings.fits) else ""
        caption = f"{what}{floor} Below: residuals (shifted sideways a little, so that they do not hide each other)."
    else:
        plot.loss_against_n(figure.subplots(), main)
        caption = "No law could be fitted; the runs alone are shown."
    name = _architecture(main.frame)
    return _picture(figure, f"Loss against width ({name})", caption, f"Held-out fvu of {name} against n for each k")


def _loss_flops(findings: Findings) -> dict[str, str] | None:
    flops = pd.to_numeric(findings.table.frame.get("flops"), errors="coerce")
    if flops is None or not np.any(flops > 0):
        return None
    figure = plot.figure(4.1)
    plot.loss_against_flops(figure.subplots(), findings.table, findings.curves, findings.front, findings.front_fit)
    constant = bool(findings.curves["constant_lr"].any())
    caption = "Grey: training curves of the constant-lr runs. " if constant else "Final points only (the lr decays). "
    caption += "Frontier: the lowest loss that any run had reached by then."
    if findings.front_fit is not None:
        values, (low, high) = findings.front_fit.values, findings.front_fit.intervals["a"]
        law = f"{number(values['E'])} + {number(values['A'])}·C^−{number(values['a'])}"
        caption += f" Fitted: {law}, exponent {interval(low, high)} by resampling whole runs."
    return _picture(figure, "Loss against compute", caption, "Held-out fvu against training FLOPs with the frontier")


def _versus_n(findings: Findings) -> dict[str, str] | None:
    return _versus(findings, "n", "ratio_n", "TopK against Switch at equal n")


def _versus_flops(findings: Findings) -> dict[str, str] | None:
    return _versus(findings, "flops", "ratio_flops", "TopK against Switch at equal FLOPs")


def _versus(findings: Findings, x: str, ratio: str, title: str) -> dict[str, str] | None:
    if not findings.versus:
        return None
    levels = sorted({row["k"] for row in findings.versus})[:6]
    figure = plot.figure(0.6 + 2.5 * len(levels))
    axes = np.atleast_1d(figure.subplots(len(levels), 1, sharex=True))
    for i, (ax, k) in enumerate(zip(axes, levels, strict=True)):
        plot.architectures(ax, findings.table, k, x, legend=i == 0)
        if i < len(levels) - 1:
            ax.set_xlabel("")
    count = sum(row[ratio] is not None for row in findings.versus)
    caption = f"Seeds averaged. {count} Switch cell(s) have a TopK counterpart at equal {'n' if x == 'n' else 'FLOPs'}."
    if x == "flops":
        caption += " TopK is interpolated between its own sizes, never extrapolated."
    return _picture(figure, title, caption, f"{title}, one panel for each k")


def _dead(findings: Findings) -> dict[str, str] | None:
    column = pd.to_numeric(findings.table.frame[findings.table.roles["dead"]], errors="coerce")
    if not column.notna().any():
        return None
    figure = plot.figure(3.6)
    plot.dead_latents(figure.subplots(), findings.table)
    return _picture(
        figure,
        "Dead latents",
        "Share of latents silent over the last train.dead_window_tokens of training.",
        "Share of dead latents against n for each k",
    )


def _rates(findings: Findings) -> dict[str, str] | None:
    if findings.rates is None:
        return None
    figure = plot.figure(3.8)
    plot.best_learning_rates(figure.subplots(), findings.rates)
    caption = "Filled: bracketed by the rates tried; hollow: at their edge, not used for the slope."
    return _picture(figure, "Best learning rate", caption, "Best learning rate against n for each k")


def _names(fits: list[FitResult]) -> str:
    return ", ".join(dict.fromkeys(result.law.name for result in fits))


def _architecture(frame: Frame) -> str:
    names = list(frame["sae"].unique()) if "sae" in frame else []
    return "TopK" if names == ["topk"] else "Switch" if names == ["switch"] else ", ".join(map(str, names)) or "runs"
