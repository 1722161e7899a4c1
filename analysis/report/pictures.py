"""The pictures of a report as inline SVG (base64), each with a title, a caption and an alternative text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.fits.intervals import noiseless
from analysis.fits.result import FitResult
from analysis.format import interval, number
from analysis.report import plot
from analysis.report.architectures import frontier_picture
from analysis.report.plot.style import encode
from analysis.report.words import floor_word
from analysis.runs.populations import at_best_rate
from harness.terminal import counted

if TYPE_CHECKING:
    from analysis.report.findings import Findings


def all_pictures(findings: Findings) -> list[dict[str, str]]:
    """Every picture that the data of a sweep allow, as src, title, caption, alt."""
    if not len(findings.shown):
        return []
    makers = (
        *(_loss_n, _blind, _loss_flops, _isoflop, frontier_picture, _versus_n, _versus_flops),
        *(_tokens, _dead, _rates, _profiles),
    )
    return [picture for maker in makers if (picture := maker(findings)) is not None]


def _picture(figure: Figure, title: str, caption: str, alt: str) -> dict[str, str]:
    return {"src": encode(figure), "title": title, "caption": caption, "alt": alt}


def _loss_n(findings: Findings) -> dict[str, str]:
    main = findings.main
    pairs: list[Any] = [result if k is None else (k, result) for k, result in findings.fits]
    figure = plot.figure(5.4 if pairs else 3.9)
    if pairs:
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
        plot.loss_against_n(upper, main, pairs, extend=4)
        upper.set_xlabel("")
        plot.residuals_against_n(lower, main, pairs)
        lower.set_xlabel("number of latents n")
        what = f"Lines: {_names([result for _, result in findings.fits])}, with the bands of the mean and of a new run."
        words = {floor_word(result) for _, result in findings.fits if result.law.floor is not None}
        floor = f" Dotted: its {' or '.join(sorted(words))}." if words else ""
        caption = f"{what}{floor} Below: residuals, shifted sideways a little so that none hides another."
    else:
        plot.loss_against_n(figure.subplots(), main)
        caption = "No law could be fitted; the runs alone are shown."
    name = _architecture(main.frame)
    return _picture(figure, f"Loss against width ({name})", caption, f"Held-out fvu of {name} against n for each k")


def _blind(findings: Findings) -> dict[str, str] | None:
    if not findings.blind:
        return None
    main = findings.main
    largest = main.values("n") == main.values("n").max()
    seen, held = main.keep(~largest, "held out"), main.keep(largest, "fitted")
    seen.excluded = main.excluded
    figure = plot.figure(4.1)
    pairs: list[Any] = [result if k is None else (k, result) for k, result in findings.blind]
    plot.loss_against_n(figure.subplots(), seen, pairs, held_out=held)
    caption = "The law fitted without the largest n (hollow): what it would have forecast."
    return _picture(figure, "The forecast put to the test", caption, "The law fitted without the largest n")


def _profiles(findings: Findings) -> dict[str, str] | None:
    usable = [(k, result) for k, result in findings.fits if result.dof > 0 and not noiseless(result.rss, result.points)]
    if not usable:
        return None
    k, result = usable[len(usable) // 2]
    names = result.law.params
    rows = math.ceil(len(names) / 2)
    figure = plot.figure(1.7 * rows)
    panels = figure.subplots(rows, 2, squeeze=False).ravel()
    for ax, name in zip(panels, names, strict=False):
        plot.profile(ax, result, name)
    for ax in panels[len(names) :]:
        ax.set_axis_off()
    where = "" if k is None else f", k = {k:g}"
    caption = (
        "√F with one parameter held at a value and the others refitted. The interval is where √F stays below the line. "
        "Dashed: the parabola (Wald)."
    )
    return _picture(figure, f"Profiles of {result.law.name}{where}", caption, "Profile of each parameter of the law")


def _isoflop(findings: Findings) -> dict[str, str] | None:
    if not findings.isoflops:
        return None
    k, profiles = findings.isoflops[len(findings.isoflops) // 2]
    figure = plot.figure(5.6)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 2])
    plot.isoflop_profiles(upper, profiles)
    plot.isoflop_minima(lower, profiles)
    caption = "Loss of each size at the same compute. Stars: the minimum, hollow if it is not bracketed."
    if profiles.law is not None:
        ends = interval(*profiles.law.intervals["p"])
        caption += f" The best n goes as C^{number(profiles.law.values['p'])} {ends}."
    return _picture(figure, f"IsoFLOP profiles, k = {k:g}", caption, "Loss against n at equal compute, and the best n")


def _tokens(findings: Findings) -> dict[str, str] | None:
    if findings.convergence is None or not len(findings.convergence.table):
        return None
    figure = plot.figure(3.8)
    plot.tokens_to_convergence(figure.subplots(), findings.convergence)
    caption = "Converged runs only. Lines: D0·n^p for each k, with the 95 % band."
    return _picture(figure, "Tokens to convergence", caption, "Tokens to convergence against n for each k")


def _loss_flops(findings: Findings) -> dict[str, str] | None:
    frame = findings.shown.frame
    if "flops" not in frame or not (pd.to_numeric(frame["flops"], errors="coerce") > 0).any():
        return None
    figure = plot.figure(4.1)
    plot.loss_against_flops(figure.subplots(), findings.shown, findings.curves, findings.front, findings.front_fit)
    constant = bool(findings.curves["constant_lr"].any())
    grey = "Grey: training curves of the runs with a constant rate."
    caption = f"{grey if constant else 'Final points only (the rate decays).'} "
    caption += "Frontier: the lowest loss of any run up to that compute."
    if findings.front_fit is not None:
        values, (low, high) = findings.front_fit.values, findings.front_fit.intervals["a"]
        law = f"{number(values['E'])} + {number(values['A'])}·C^−a"
        caption += f" Fitted: {law} with a = {number(values['a'])} {interval(low, high)}, by resampling whole runs."
    return _picture(figure, "Loss against compute", caption, "Held-out fvu against training FLOPs with the frontier")


def _versus_n(findings: Findings) -> dict[str, str] | None:
    return _versus(findings, "n", "ratio_n", "TopK against Switch at equal n")


def _versus_flops(findings: Findings) -> dict[str, str] | None:
    return _versus(findings, "flops", "ratio_flops", "TopK against Switch at equal FLOPs")


def _versus(findings: Findings, x: str, ratio: str, title: str) -> dict[str, str] | None:
    if not findings.versus:
        return None
    levels = sorted({row["k"] for row in findings.versus})[:6]
    both = at_best_rate(findings.shown)
    both = both.keep(both.frame["sae"].isin(["topk", "switch"]).to_numpy(), "neither TopK nor Switch")
    figure = plot.figure(0.6 + 2.5 * len(levels))
    axes = np.atleast_1d(figure.subplots(len(levels), 1, sharex=True))
    for i, (ax, k) in enumerate(zip(axes, levels, strict=True)):
        plot.architectures(ax, both, k, x, legend=i == 0)
        if i < len(levels) - 1:
            ax.set_xlabel("")
    count = sum(row[ratio] is not None for row in findings.versus)
    equal = "n" if x == "n" else "FLOPs"
    caption = f"Seeds averaged. {counted(count, 'Switch cell')} with a TopK counterpart at equal {equal}."
    if x == "flops":
        caption += " TopK is interpolated between its own sizes, never extrapolated."
    return _picture(figure, title, caption, f"{title}, one panel for each k")


def _dead(findings: Findings) -> dict[str, str] | None:
    column = pd.to_numeric(findings.shown.frame[findings.shown.roles["dead"]], errors="coerce")
    if not column.notna().any():
        return None
    figure = plot.figure(4.2)
    plot.dead_latents(figure.subplots(), at_best_rate(findings.shown))
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
    caption = "Filled: bracketed by other rates. Hollow: at the edge of the rates tried, not used for the slope."
    return _picture(figure, "Best learning rate", caption, "Best learning rate against n for each k")


def _names(fits: list[FitResult]) -> str:
    return ", ".join(dict.fromkeys(result.law.name for result in fits))


def _architecture(frame: pd.DataFrame) -> str:
    names = list(frame["sae"].unique()) if "sae" in frame else []
    return "TopK" if names == ["topk"] else "Switch" if names == ["switch"] else ", ".join(map(str, names)) or "runs"
