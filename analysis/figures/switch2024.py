"""The figures of Mudide et al. 2024 that runs at our scale can carry, in the form of the paper."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analysis.figures.drawn import COLORS, MARKERS, Drawn, finish, lines
from analysis.figures.published import (
    SWITCH_BALANCE,
    SWITCH_FLOP_MATCHED,
    SWITCH_K,
    SWITCH_MSE,
    SWITCH_SCALING,
    SWITCH_WIDTH_MATCHED,
    SWITCH_WIDTHS,
)
from analysis.figures.switch2024_claims import ORDERS, QUALITY, ROUTER, WIDTHS, flop_matched, most_cells, width_matched
from analysis.figures.tables import Studies, Study, pick
from analysis.report import plot
from analysis.report.plot.style import add_legend, log_axes

THEIRS = "Mudide et al.: GPT-2 small, MSE"


def figures(studies: Studies) -> list[Drawn]:
    """Every figure whose study has runs."""
    makers = ((ORDERS, _scaling), (ORDERS, _flop_matched), (WIDTHS, _width_matched), (ROUTER, _balance))
    drawn = [maker(study) for names, maker in makers if (study := pick(studies, *names)) is not None]
    judged = (study for names in (ORDERS, QUALITY) if (study := pick(studies, *names)) is not None)
    drawn += [next((figure for study in judged if (figure := _experts(study)) is not None), None)]
    return [figure for figure in drawn if figure is not None]


def _name(experts: float) -> str:
    return "TopK" if experts == 1 else f"{experts:g} experts"


def _scaling(study: Study) -> Drawn:
    frame = study.runs.frame
    k = most_cells(study)
    most = frame["n_latents"].nunique()
    kinds = [
        e for e, part in frame[frame["k"] == k].groupby("n_experts") if part["n_latents"].nunique() >= min(3, most)
    ]
    columns = ["n_experts", "n_latents", "k", "seed", "flops", "params", "fvu", "fvu_se"]
    data = frame[(frame["k"] == k) & frame["n_experts"].isin(kinds)][columns]
    picture = plot.figure(7.0, 9.0)
    panels = picture.subplots(2, 2).ravel()
    axes = (("flops", "training FLOPs"), ("params", "parameters"), ("n_latents", "number of latents n"))
    for ax, (x, label) in zip(panels, axes, strict=False):
        lines(ax, data, x, "fvu", "n_experts", kinds, [_name(float(e)) for e in kinds])  # pyright: ignore
        finish(ax, label, "held-out fvu", f"ours, k = {k:g}", sorted(set(data[x])) if x == "n_latents" else ())
    published = panels[3]
    for i, (name, mse) in enumerate(SWITCH_SCALING.items()):
        style = {"color": COLORS[i], "marker": MARKERS[i], "mfc": "white", "ls": "--"}
        published.plot(SWITCH_WIDTHS, mse, label=name, ms=5, lw=1.3, **style)
    finish(published, "number of latents n", "MSE", f"{THEIRS}, k = 32", SWITCH_WIDTHS[::2])
    caption = "Figure 1: loss against FLOPs and against parameters; the paper's points have other axes and other units."
    return Drawn("figure_01_scaling", caption, picture, data)


def _flop_matched(study: Study) -> Drawn | None:
    parts = flop_matched(study)
    names: Mapping[int, str] = dict(zip((1, 2, 4, 8), SWITCH_FLOP_MATCHED, strict=True))
    return _pareto(parts, names, "figure_03_flop_matched", "equal FLOPs per token, latents of an expert")


def _width_matched(study: Study) -> Drawn | None:
    names: Mapping[int, str] = dict(zip((1, 16, 32, 64, 128), SWITCH_WIDTH_MATCHED, strict=True))
    return _pareto(width_matched(study), names, "figure_03_width_matched", "equal width n")


def _pareto(
    parts: list[tuple[float, pd.DataFrame]], published: Mapping[int, str], name: str, what: str
) -> Drawn | None:
    """Loss against k at one width, and the ratio to TopK of ours and of the paper."""
    if not parts:
        return None
    width, part = max(parts, key=lambda entry: (entry[1]["k"].nunique(), entry[0]))
    numbers = sorted(set(part["n_experts"]))
    data = part[["n_experts", "n_latents", "k", "seed", "l0", "flops", "fvu", "fvu_se"]].assign(of="ours")
    picture = plot.figure(4.2, 10.6)
    left, right = picture.subplots(1, 2)
    lines(left, data, "k", "fvu", "n_experts", numbers, [_name(float(number)) for number in numbers])
    finish(left, "active latents k (L0)", "held-out fvu", f"{what}: {width:,.0f}", ticks=sorted(set(data["k"])))
    base = data[data["n_experts"] == 1].groupby("k")["fvu"].mean()
    for i, number in enumerate(numbers):
        if number != 1:
            ratio = data[data["n_experts"] == number].groupby("k")["fvu"].mean() / base
            right.plot(
                ratio.index, ratio, color=COLORS[i], marker=MARKERS[i], ms=5, lw=1.3, label=f"ours, {_name(number)}"
            )
    theirs = []
    for i, (number, label) in enumerate(published.items()):
        ratio = np.array(SWITCH_MSE[label]) / np.array(SWITCH_MSE["TopK"])
        theirs += [
            {"of": "paper", "n_experts": number, "k": k, "ratio_to_topk": r}
            for k, r in zip(SWITCH_K, ratio, strict=True)
        ]
        if number != 1:
            style = {"color": COLORS[i], "marker": MARKERS[i], "mfc": "white", "ls": "--"}
            right.plot(SWITCH_K, ratio, ms=5, lw=1.1, label=f"paper, {label}", **style)
    right.axhline(1, color="0.5", lw=1)
    finish(right, "active latents k (L0)", "loss over that of TopK", f"dashed: {THEIRS}", ticks=(8, 16, 32, 64, 192))
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8.5)
    data = data.assign(ratio_to_topk=data["fvu"] / data["k"].map(base))
    kind = what.partition(",")[0]
    caption = f"Figure 3, {kind}: fvu against k, and the ratio to TopK beside that of the paper (another model)."
    return Drawn(name, caption, picture, pd.concat([data, pd.DataFrame(theirs)], ignore_index=True))


def _balance(study: Study) -> Drawn:
    frame = study.runs.frame.sort_values("sae.balance_weight")
    data = frame[["sae.balance_weight", "n_experts", "n_latents", "k", "seed", "fvu", "fvu_se", "imbalance"]]
    picture = plot.figure(3.8, 9.4)
    ours, load, theirs = picture.subplots(1, 3)
    weights = data["sae.balance_weight"].to_numpy(dtype=float)
    x, labels = np.arange(len(weights)), [f"{weight:g}" for weight in weights]
    ours.plot(x, data["fvu"], "o-", color=COLORS[1], ms=5)
    load.plot(x, data["imbalance"], "s-", color=COLORS[2], ms=5)
    load.axhline(1, color="0.5", lw=1)
    theirs.plot(range(len(SWITCH_BALANCE)), list(SWITCH_BALANCE.values()), "o--", color=COLORS[1], mfc="white", ms=5)
    theirs.set_xticks(range(len(SWITCH_BALANCE)), [f"{weight:g}" for weight in SWITCH_BALANCE])
    n, k, experts = (data[name].iloc[0] for name in ("n_latents", "k", "n_experts"))
    titles = (f"ours: {experts:g} experts, n = {n:,.0f}, k = {k:g}", "ours", "Mudide et al.: 16 experts, k = 64")
    names = ("held-out fvu", "imbalance E·Σf²", "MSE (GPT-2 small)")
    for ax, name, title in zip((ours, load, theirs), names, titles, strict=True):
        ax.set_ylabel(name)
        ax.set_title(title, fontsize=9.5, loc="left")
        ax.grid(True, color="0.9", lw=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("weight α, raw units" if ax is theirs else "weight λ, units of fvu")
        if ax is not theirs:
            ax.set_xticks(x, labels)
    caption = "Figure 7: the weight of the balance term. The papers' α and our λ are in different units."
    return Drawn("figure_07_balance", caption, picture, data)


def _experts(study: Study) -> Drawn | None:
    """Cosines between experts, and whether rows cluster by expert: in place of the t-SNE, which needs weights."""
    columns = ["quality.geometry.expert_purity_encoder", "quality.geometry.expert_purity"]
    points, frame = study.points, study.runs.frame
    if not len(points) or not (points["metric"] == "geometry").any() or not set(columns) <= set(frame):
        return None
    runs = frame[frame["run_id"].isin(points["run"][points["metric"] == "geometry"])]
    best = runs.sort_values(["n_experts", "n_latents", "k"]).iloc[-1]
    cells = points[(points["run"] == best["run_id"]) & (points["metric"] == "geometry")]
    table = cells.pivot_table(index="expert", columns="other", values="cosine")
    picture = plot.figure(3.9, 9.0)
    left, right = picture.subplots(1, 2)
    image = left.imshow(table, cmap="viridis")
    picture.colorbar(image, ax=left, fraction=0.05, pad=0.03)
    left.set_xlabel("expert j")
    left.set_ylabel("expert i")
    title = f"mean largest cosine of i's latents in j, n = {best['n_latents']:,.0f}, k = {best['k']:g}"
    left.set_title(title, fontsize=9.5, loc="left")
    number = best["n_experts"]
    experts = frame[(frame["n_experts"] == number) & frame[columns[0]].notna()]
    for i, (column, name) in enumerate(zip(columns, ("encoder rows", "decoder rows"), strict=True)):
        means = experts.groupby("n_latents")[column].mean() * 100
        right.plot(means.index, means, color=COLORS[i], marker=MARKERS[i], ms=5, label=name)
    right.axhline(100 / number, color="0.5", ls="--", label="chance")
    sizes = experts["n_latents"].to_numpy()
    log_axes(
        right, "number of latents n", "nearest rows of the own expert [%]", sizes, powers_of_two=True, y_scale="linear"
    )
    right.set_ylim(0, 100)
    right.set_title(f"{number:g} experts, mean over k", fontsize=9.5, loc="left")
    add_legend(right)
    caption = "Figures 4 and 5: latents that experts share (left), and whether rows cluster by expert (right)."
    kept = experts[["run_id", "n_experts", "n_latents", "k", *columns]]
    data = pd.concat([cells[["expert", "other", "cosine"]], kept.drop(columns="run_id")], ignore_index=True)
    return Drawn("figure_05_experts", caption, picture, data)
