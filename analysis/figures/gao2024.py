"""The figures of Gao et al. 2024 that runs at our scale can carry, in the form of the paper."""

from __future__ import annotations

import numpy as np

from analysis.figures.drawn import COLORS, Drawn, finish, lines
from analysis.figures.gao2024_claims import (
    BASELINES,
    DEAD,
    DEAD_CELL,
    LAW,
    QUALITIES,
    QUALITY,
    RATES,
    convergence,
    law_fits,
    rates,
)
from analysis.figures.published import GAO_CONVERGENCE, GAO_RATE
from analysis.figures.tables import Studies, Study, pick
from analysis.fits.status import Status
from analysis.questions.convergence import TOKENS, Convergence
from analysis.report import plot
from analysis.report.plot.style import add_legend, log_axes

SAES = ("topk", "multi_topk", "relu", "gated", "prolu")
SAE_NAMES = ("TopK", "Multi-TopK", "ReLU", "Gated", "ProLU")


def figures(studies: Studies) -> list[Drawn]:
    """Every figure whose study has runs."""
    makers = (
        *((LAW, _law), (LAW, _tokens), (BASELINES, _against_l0), (BASELINES, _against_n), (BASELINES, _progressive)),
        *((RATES, _rates), (DEAD, _dead), (QUALITY, _quality)),
    )
    drawn = [maker(study) for names, maker in makers if (study := pick(studies, *names)) is not None]
    return [figure for figure in drawn if figure is not None]


def _law(study: Study) -> Drawn | None:
    _, chosen = law_fits(study)
    converged = study.runs.keep(study.runs.column("converged").eq(True).to_numpy(), "not converged")
    if not len(converged):
        return None
    picture = plot.figure(4.2, 5.6)
    plot.loss_against_n(picture.subplots(), converged, [] if chosen.status is Status.FAILED else [chosen])
    data = converged.frame[["n_latents", "k", "seed", "fvu", "fvu_se", "tokens"]]
    caption = f"Figure 1: held-out fvu at convergence against n, with the law `{chosen.law.name}`."
    return Drawn("figure_01_law", caption, picture, data)


def _tokens(study: Study) -> Drawn | None:
    found, epsilon = convergence(study)
    if not len(found.table):
        return None
    picture = plot.figure(4.2, 5.6)
    ax = picture.subplots()
    plot.tokens_to_convergence(ax, Convergence(found.table, [], []))
    n = np.geomspace(found.table.values("n").min(), found.table.values("n").max(), 20)
    middle = np.exp(np.log(found.table.values("loss")).mean())
    ax.plot(n, middle * (n / np.sqrt(n[0] * n[-1])) ** GAO_CONVERGENCE, color="0.3", ls="--", lw=1.4)
    ax.plot([], [], color="0.3", ls="--", label=f"slope of the paper: n^{GAO_CONVERGENCE:g} (GPT-2)")
    add_legend(ax)
    data = found.table.frame[["n_latents", "k", "seed", TOKENS]]
    caption = f"Figure 11: tokens until held-out fvu gains less than {100 * epsilon:g} % over a doubling of tokens."
    return Drawn("figure_11_tokens", caption, picture, data)


def _against_l0(study: Study) -> Drawn:
    frame = study.runs.frame
    largest = (
        frame[frame["sae"] == "relu"]["n_latents"].min() if (frame["sae"] == "relu").any() else frame["n_latents"].min()
    )
    data = frame[frame["n_latents"] == largest][["sae", "n_latents", "k", "l0", "fvu", "fvu_se"]]
    picture = plot.figure(4.0, 5.4)
    ax = picture.subplots()
    lines(ax, data, "l0", "fvu", "sae", SAES, SAE_NAMES)
    finish(ax, "L0 on held-out rows", "held-out fvu", f"n = {largest:,.0f}", ticks=sorted(set(frame["k"])))
    caption = "Figure 2a: fvu against the measured L0 at fixed n."
    return Drawn("figure_02a_l0", caption, picture, data)


def _against_n(study: Study) -> Drawn | None:
    """Needs baselines at two widths."""
    frame = study.runs.frame
    widths = frame.groupby("sae")["n_latents"].nunique()
    if (widths > 1).sum() < 3:
        return None
    k = 32 if (frame["k"] == 32).any() else frame["k"].max()
    data = frame[frame["k"] == k][["sae", "n_latents", "k", "l0", "fvu", "fvu_se"]]
    picture = plot.figure(4.0, 5.4)
    ax = picture.subplots()
    lines(ax, data, "n_latents", "fvu", "sae", SAES, SAE_NAMES)
    finish(ax, "number of latents n", "held-out fvu", f"k or target of L0: {k:g}", ticks=sorted(set(data["n_latents"])))
    return Drawn("figure_02b_n", "Figure 2b: fvu against n at one L0.", picture, data)


def _progressive(study: Study) -> Drawn | None:
    points = study.points
    if not len(points) or not (points["metric"] == "progressive").any():
        return None
    runs = study.runs.frame[["run_id", "sae", "n_latents", "k"]].rename(columns={"run_id": "run", "k": "trained_k"})
    data = points[points["metric"] == "progressive"][["run", "k", "fvu"]].merge(runs, on="run")
    shared = data[data["sae"] == "multi_topk"]["trained_k"]
    if not len(shared):
        return None
    k = 32 if (shared == 32).any() else shared.max()
    data = data[(data["trained_k"] == k) & (data["n_latents"] == data["n_latents"].min())]
    data = data[data["sae"].isin(["topk", "multi_topk"])]
    picture = plot.figure(4.0, 5.4)
    ax = picture.subplots()
    lines(ax, data, "k", "fvu", "sae", SAES[:2], SAE_NAMES[:2])
    ax.axvline(float(k), color="0.6", ls=":", lw=1.2, label="k of the training")
    finish(
        ax,
        "active latents k′ at test time",
        "held-out fvu",
        f"n = {data['n_latents'].iloc[0]:,.0f}, trained with k = {k:g}",
    )
    caption = "Figure 10: codes of other sizes than the SAE was trained for."
    return Drawn("figure_10_progressive", caption, picture, data.drop(columns="run"))


def _rates(study: Study) -> Drawn:
    best = rates(study)
    data = study.runs.frame[["n_latents", "k", "lr", "train.lr_factor", "fvu", "fvu_se", "dead_frac"]]
    picture = plot.figure(4.2, 9.0)
    left, right = picture.subplots(1, 2)
    sizes = sorted(set(data["n_latents"]))
    lines(left, data, "lr", "fvu", "n_latents", sizes, [f"n = {n:,.0f}" for n in sizes])
    left.set_xlim(data["lr"].min() / 1.4, data["lr"].max() * 6)  # room for the legend
    finish(left, "learning rate", "held-out fvu")
    plot.best_learning_rates(right, best)
    n = np.geomspace(min(sizes), max(sizes), 20)
    middle = float(np.exp(np.log(best.rates["lr"]).mean()))
    right.plot(n, middle * (n / np.sqrt(n[0] * n[-1])) ** GAO_RATE, color="0.6", ls="--", lw=1.4)
    right.plot([], [], color="0.6", ls="--", label=f"slope of the paper: n^{GAO_RATE:g} (GPT-2)")
    add_legend(right)
    caption = "Figure 3: fvu against the learning rate at each n, and the best rate against n (hollow: at the edge)."
    return Drawn("figure_03_learning_rate", caption, picture, data)


def _dead(study: Study) -> Drawn:
    frame = study.runs.frame
    data = frame[["sae.init", "sae.aux_alpha", "train.lr_factor", "seed", "dead_frac", "fvu", "fvu_se"]]
    factors = sorted(set(frame["train.lr_factor"]))
    picture = plot.figure(3.8, 4.2 * len(factors))
    panels = np.atleast_1d(picture.subplots(1, len(factors), sharey=True))
    for ax, factor in zip(panels, factors, strict=True):
        part = frame[frame["train.lr_factor"] == factor]
        means = part.groupby(list(DEAD_CELL[:2]))["dead_frac"].mean() * 100
        for i, aux in enumerate(sorted(set(part["sae.aux_alpha"]))):
            for j, init in enumerate(("tied", "untied")):
                height = float(means.get((init, aux), np.nan))
                bar = ax.bar(j + 0.38 * (i - 0.5), height, 0.36, color=COLORS[1 if aux else 3])
                ax.bar_label(bar, fmt="%.1f", fontsize=9, padding=2)
        ax.set_xticks([0, 1], ["tied", "untied"])
        ax.set_xlabel("initial encoder")
        ax.set_title(f"learning rate {factor:g} times the rule", fontsize=10, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(y=0.15)
    panels[0].set_ylabel("dead latents at the end [%]")
    for color, name in ((COLORS[3], "without AuxK"), (COLORS[1], "with AuxK")):
        panels[0].bar([0], [0], color=color, label=name)
    panels[0].legend(frameon=False, fontsize=9, loc="upper left")
    n, k = frame["n_latents"].iloc[0], frame["k"].iloc[0]
    caption = f"Figure 15: dead latents at n = {n:,.0f}, k = {k:g}; means over seeds."
    return Drawn("figure_15_dead", caption, picture, data)


QUALITY_NAMES = {
    "quality.downstream.kl": "KL [nats per token]",
    "quality.probes.loss": "probe loss [nats]",
    "quality.explanations.recall": "recall of n-grams",
    "quality.ablation.sparsity": "ablation sparsity",
}


def _quality(study: Study) -> Drawn | None:
    frame = study.runs.frame
    known = [column for _, column, _, _ in QUALITIES if column in frame and frame[column].notna().sum() > 1]
    if not known:
        return None
    rows = (len(known) + 1) // 2
    picture = plot.figure(3.4 * rows, 9.0)
    panels = picture.subplots(rows, 2, squeeze=False).ravel()
    series = [(sae, k) for sae in ("topk", "switch") for k in sorted(set(frame["k"])) if (frame["sae"] == sae).any()]
    for ax, column in zip(panels, known, strict=False):
        for i, (sae, k) in enumerate(series):
            part = frame[(frame["sae"] == sae) & (frame["k"] == k) & frame[column].notna()].sort_values("n_latents")
            error = part[f"{column}_se"].to_numpy(dtype=float) if f"{column}_se" in part else None
            style = {"color": COLORS[i], "marker": "o" if sae == "topk" else "s", "ls": "-" if sae == "topk" else "--"}
            name = f"{'TopK' if sae == 'topk' else 'Switch, 8 experts'}, k = {k:g}"
            ax.errorbar(part["n_latents"], part[column], error, ms=5, lw=1.3, capsize=2, label=name, **style)
        log_axes(ax, "number of latents n", QUALITY_NAMES[column], frame["n_latents"].to_numpy(), powers_of_two=True)
    add_legend(panels[0], ncols=2, below=True)
    for ax in panels[len(known) :]:
        ax.set_axis_off()
    caption = (
        "Figures 5, 6 and 9: downstream loss, probe loss, explanations and ablation sparsity; ± one standard error."
    )
    columns = [name for column in known for name in (column, f"{column}_se") if name in frame]
    return Drawn("figure_05_06_09_quality", caption, picture, frame[["sae", "n_experts", "n_latents", "k", *columns]])
