"""The section on quality: what features are worth against n and k, beside what chance and simple errors give."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.format import interval, number
from analysis.questions.quality_pairs import KL, quality_pairs
from analysis.questions.seeds import SHARED, seed_stability
from analysis.report import plot
from analysis.report.pictures import encode
from analysis.report.plot.style import GREY, LINES, add_legend, k_style, log_axes, plain_log_ticks
from analysis.runs.quality import PREFIX
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.record.quality import read_quality

LAWS = ("sae_nk_no_floor", "sae_nk_no_interaction", "sae_nk")
"""Of KL, the fewest parameters first: small sweeps have few runs. The first that fits without a caution is told."""


class Panel(NamedTuple):
    """A quality against n."""

    column: str
    title: str
    label: str
    """Of the y axis."""
    caption: str
    controls: tuple[str, ...] = ()
    """Columns that are drawn as grey lines: what no SAE is needed for."""
    log: bool = False


PANELS = (
    Panel(
        KL,
        "KL against width",
        "KL, nats per token",
        "Between the model and the model with x replaced. Good: 0.",
        log=True,
    ),
    Panel(
        "quality.downstream.delta_ce",
        "ΔCE against width",
        "ΔCE, nats per token",
        "What replacing x costs the next-token loss, nats per token. Good: 0; it may be negative.",
    ),
    Panel(
        "quality.probes.loss",
        "Probe loss against width",
        "probe loss, nats",
        "Cross-entropy of the best single latent, mean over labels, on held-out documents. Good: the probe on all "
        "channels. Chance: the constant, and the best of n random directions.",
        ("quality.probes.loss_constant", "quality.probes.loss_random", "quality.probes.loss_full"),
    ),
    Panel(
        "quality.explanations.precision",
        "Precision of token patterns",
        "precision",
        "Share of places with the pattern at which the latent is active. Good: 1. Chance: the density of the latents.",
        ("quality.explanations.density",),
    ),
    Panel(
        "quality.detection.detection_auc",
        "Detection of latents by their explanation",
        "AUC",
        "AUC of the judge. Good: 1. Floor: explanations of other latents.",
        ("quality.detection.detection_auc_shuffled",),
    ),
    Panel(
        "quality.ablation.sparsity",
        "Sparsity of ablations",
        "share of the logits",
        "Share of the logits that an active latent changes. A random direction of the same size is the control.",
        ("quality.ablation.sparsity_random", "quality.ablation.sparsity_channels"),
    ),
    Panel(
        "quality.knowledge.score",
        "Country and continent held apart",
        "score",
        "Mean of cause and iso when latents of one fact are exchanged between cities. Good: 1. Chance: one half, as of "
        "random latents. Channels and principal directions are the baselines.",
        tuple(f"quality.knowledge.score_{control}" for control in ("random", "neurons", "pca")),
    ),
    Panel(
        "quality.geometry.duplicates",
        "Duplicates against width",
        "share of latents",
        "Share of latents with another decoder row at a cosine above 0.9. Good: 0.",
    ),
)


BESIDE = 1.5
"""How far an axis reaches beyond the SAEs, as a factor."""


def quality_section(table: RunTable) -> dict[str, Any] | None:
    """`pictures` and `lines` of the section; None if no run was evaluated."""
    frame = table.frame
    if not any(str(column).startswith(PREFIX) for column in frame):
        return None
    pictures = [_kl_against_fvu(table), *(_panel(frame, panel) for panel in PANELS)]
    return {
        "pictures": [picture for picture in pictures if picture is not None],
        "lines": [*_law_of_kl(table), *_pairs(table), *_seeds(table)],
    }


def _known(frame: pd.DataFrame, column: str) -> bool:
    return column in frame and bool(np.isfinite(frame[column].astype(float)).any())


def _groups(frame: pd.DataFrame) -> list[tuple[str, float, pd.DataFrame]]:
    """Architecture, k and their runs by rising n."""
    grouped = frame.groupby(["sae", "k"], sort=True)
    return [(str(sae), float(k), part.sort_values("n_latents")) for (sae, k), part in grouped]  # pyright: ignore


def _points(ax: Axes, frame: pd.DataFrame, x: str, y: str, line: bool) -> None:
    """The runs of every architecture and k with their standard errors: colour and marker tell k, filled and solid is
    TopK (else the first architecture)."""
    levels = sorted(set(frame["k"].astype(float)))
    names = sorted(set(frame["sae"].astype(str)), key=lambda name: (name != "topk", name))
    for sae, k, part in _groups(frame):
        error = part.get(f"{y}_se")
        style, place = k_style(levels, k), names.index(sae)
        style |= {"ls": LINES[place % len(LINES)] if line else "none", "lw": 1.2, "ms": 5, "capsize": 0}
        error = None if error is None else error.astype(float).fillna(0.0)
        ax.errorbar(part[x], part[y], yerr=error, mfc="white" if place else style["color"], **style)
    for k in levels:
        ax.plot([], [], ls="none", ms=5, label=f"k = {k:g}", **k_style(levels, k))
    for place, sae in enumerate(names if len(names) > 1 else ()):
        style = {"ls": LINES[place % len(LINES)] if line else "none", "marker": "o", "ms": 5, "color": "0.3"}
        ax.plot([], [], mfc="white" if place else "0.3", label=sae, **style)


def _panel(frame: pd.DataFrame, panel: Panel) -> dict[str, str] | None:
    if not _known(frame, panel.column):
        return None
    figure = plot.figure(3.9)
    ax = figure.subplots()
    _points(ax, frame, "n_latents", panel.column, line=True)
    for number_, control in enumerate(column for column in panel.controls if _known(frame, column)):
        by_n = frame.groupby("n_latents")[control].mean()
        name = control.rpartition(".")[2].replace("_", " ")
        ax.plot(by_n.index, by_n, color=GREY, ls=LINES[number_ % len(LINES)], lw=1, label=name)
    sizes = frame["n_latents"].to_numpy(dtype=float)
    log_axes(ax, "number of latents n", panel.label, sizes, True, y_scale="log" if panel.log else "linear")
    add_legend(ax, ncols=4, below=True)
    bars = " Bars: one standard error." if _known(frame, f"{panel.column}_se") else ""
    return {
        "src": encode(figure),
        "title": panel.title,
        "caption": panel.caption + bars,
        "alt": f"{panel.title} for each k",
    }


def _kl_against_fvu(table: RunTable) -> dict[str, str] | None:
    frame, fvu = table.frame, "quality.downstream.fvu"
    if not (_known(frame, KL) and _known(frame, fvu)):
        return None
    figure = plot.figure(3.9)
    ax = figure.subplots()
    for name, points in _calibration(table).items():
        label = {"pca": "PCA of rank r", "noise": "isotropic noise"}.get(name, name)
        line = "-" if name == "pca" else "--"
        ax.plot([p["fvu"] for p in points], [p["kl"] for p in points], color=GREY, ls=line, lw=1, label=label)
    _points(ax, frame, fvu, KL, line=False)
    log_axes(ax, "fvu of the replaced rows", "KL, nats per token")
    # the curves reach from hardly any error to all of it
    for limits, column in ((ax.set_xlim, fvu), (ax.set_ylim, KL)):
        known = frame[column].astype(float).dropna()
        known = known[known > 0]
        limits(known.min() / BESIDE, known.max() * BESIDE)
    plain_log_ticks(ax.xaxis)
    add_legend(ax, ncols=4, below=True)
    caption = "Below the grey curves: errors that hurt the model less than those of PCA or of noise with the same fvu."
    caption += " Bars: one standard error."
    return {"src": encode(figure), "title": "KL against fvu", "caption": caption, "alt": "KL against fvu of all SAEs"}


def _calibration(table: RunTable) -> dict[str, list[dict[str, float]]]:
    """The curves of the first run that has them; all runs of a sweep share them."""
    for directory in table.directories.values():
        found = read_quality(directory, "downstream")
        if found is not None and found.get("curves"):
            return found["curves"]
    return {}


def _law_of_kl(table: RunTable) -> list[str]:
    """A sentence per architecture: the exponents of KL in n and k, with intervals."""
    if not _known(table.frame, KL):
        return []
    lines = []
    for sae in sorted(set(table.frame["sae"].astype(str))):
        part = table.where(sae=sae)
        part = RunTable(part.frame, {**part.roles, "loss": KL, "loss_se": f"{KL}_se"}, name=part.name)
        try:
            lines.append(f"{sae}: {_law_words(_simplest(part))}")
        except UserError as problem:
            lines.append(f"{sae}: no law of KL ({problem}).")
    return lines


def _simplest(part: RunTable) -> FitResult:
    """The first of `LAWS` that fits well; the very first if none does. Raises `UserError` if that has too few runs."""
    first = fit(part, LAWS[0], starts=16, regime="all")
    for law in LAWS[1:] if first.status is not Status.OK else ():
        try:
            result = fit(part, law, starts=16, regime="all")
        except UserError:
            continue
        if result.status is Status.OK:
            return result
    return first


_MOST_PAIRS = 12


def _pairs(table: RunTable) -> list[str]:
    """A sentence per pair of architectures with the same n and k: what the second costs beyond the first."""
    pairs = quality_pairs(table)
    lines = [
        f"n = {pair.n:,}, k = {pair.k:g}: {pair.second} has {number(pair.kl_ratio)} times the KL of {pair.first} "
        f"{interval(*pair.kl_interval)}; ΔCE differs by {number(pair.delta_ce)} {interval(*pair.delta_ce_interval)} "
        "nats per token (same documents, paired)."
        for pair in pairs[:_MOST_PAIRS]
    ]
    if len(pairs) > _MOST_PAIRS:
        lines.append(f"{len(pairs) - _MOST_PAIRS} more pairs: analysis.questions.quality_pairs.quality_pairs(table).")
    return lines


def _seeds(table: RunTable) -> list[str]:
    """A sentence per cell with two seeds: how much of its dictionary the other seed finds again."""
    if "quality.geometry.duplicates" not in table.frame:
        return []
    return [
        f"{entry.sae}, n = {entry.n:,}, k = {entry.k:g}: {100 * entry.shared:.0f} % of the decoder rows of one seed "
        f"have a cosine above {SHARED:g} with a row of the other; the mean of the largest cosine is "
        f"{number(entry.mean_cosine)} (random rows: {number(entry.random_cosine)})."
        for entry in seed_stability(table)[:_MOST_PAIRS]
    ]


def _law_words(result: FitResult) -> str:
    if result.status is Status.FAILED:
        return f"no law of KL ({result.law.formula}) can be fitted to {result.points} runs."
    values = [
        f"{name} = {number(result.values[name])} {interval(*result.intervals[name])}" for name in result.law.params
    ]
    caution = " Not reliable: see the notes of the fit." if result.status is Status.UNRELIABLE else ""
    return f"KL = {result.law.formula} over {result.points} runs: {', '.join(values)}.{caution}"
