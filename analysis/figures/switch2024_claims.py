"""Mudide et al. 2024: what the paper claims, and what our runs say."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.figures.claims import Claim, Estimate, Verdict, direction, equals, exponential, mean_of, steps
from analysis.figures.published import (
    SWITCH_BALANCE,
    SWITCH_FLOP_MATCHED,
    SWITCH_K,
    SWITCH_MSE,
    SWITCH_SCALING,
    SWITCH_WIDTHS,
)
from analysis.figures.tables import Studies, Study, pick
from analysis.questions.multiplier import on_every_axis
from analysis.questions.paired import PairedErrors, mean_difference
from analysis.runs.curves import curve

ORDERS = ("switch2024_orders", "switch2024_flop_matched")
WIDTHS = ("switch2024_orders", "switch2024_width_matched")
ROUTER = ("switch2024_router",)
CONTROLS = ("routing",)
QUALITY = ("quality",)


def claims(studies: Studies) -> list[Claim]:
    """Every claim of the paper that has a study here, or would need one."""
    return [
        *(_flop_matched(studies), _width_matched(studies), _efficiency(studies), *_compute(studies)),
        *(*_balance(studies), _wall_clock(), *_geometry(studies), *_beyond(studies)),
    ]


# -- orders -----------------------------------------------------------------------------------------------------------


def flop_matched(study: Study) -> list[tuple[float, pd.DataFrame]]:
    """(latents of an expert, runs) of each width that was trained alone and as the width of every expert."""
    frame = study.runs.frame
    frame = frame.assign(per_expert=frame["n_latents"] / frame["n_experts"])
    groups = [(float(width), part) for width, part in frame.groupby("per_expert")]  # pyright: ignore
    return [(width, part) for width, part in groups if {1, 2, 4, 8} <= set(part["n_experts"])]


def width_matched(study: Study) -> list[tuple[float, pd.DataFrame]]:
    """(latents of all experts, runs) of each width that was trained with every number of experts."""
    groups = [(float(n), part) for n, part in study.runs.frame.groupby("n_latents")]  # pyright: ignore
    most = max((part["n_experts"].nunique() for _, part in groups), default=0)
    return [(n, part) for n, part in groups if most > 1 and part["n_experts"].nunique() == most]


def most_cells(study: Study) -> float:
    """The k at which most sizes were trained."""
    return float(study.runs.frame["k"].value_counts().idxmax())  # pyright: ignore


def ratios(study: Study, part: pd.DataFrame) -> list[tuple[float, float, float, Estimate]]:
    """(k, experts, more experts, fvu with more experts over fvu with fewer) for each step between neighbours."""
    errors = study.errors(study.runs)
    found = []
    for k, cells in part.groupby("k"):  # pyright: ignore
        numbers = sorted(set(cells["n_experts"]))
        for few, many in itertools.pairwise(numbers):
            ratio = _ratio(errors, cells[cells["n_experts"] == many], cells[cells["n_experts"] == few])
            found.append((float(k), float(few), float(many), ratio))  # pyright: ignore
    return found


def _ordered(claim: Claim, study: Study, parts: Sequence[tuple[float, pd.DataFrame]], sign: int, what: str) -> Claim:
    if not parts:
        return claim.missing("a width with every number of experts")
    every = [(width, *step) for width, part in parts for step in ratios(study, part)]
    estimates = [step[-1] for step in every]
    agree = sum(direction(each, sign, of=1.0) is Verdict.SHOWN for each in estimates)
    against = [(f"{what} {w:,.0f}, k = {k:g}, {a:g} → {b:g}", e) for w, k, a, b, e in every if e.side(1.0) == -sign]
    text = f"{agree} of {len(estimates)} steps as claimed, {len(against)} against"
    if against:
        text += f", e.g. {against[0][0]}: {against[0][1]}"
    mean = exponential(mean_of([math.log(each.value) for each in estimates]))
    widths = ", ".join(f"{width:,.0f}" for width, _ in parts)
    where = f"{what} {widths}; fvu ratio of a step, mean {mean}; paired by document and between seeds"
    return claim.judged(steps(estimates, sign, of=1.0), text, where, "more seeds where a step holds 1")


def _flop_matched(studies: Studies) -> Claim:
    k = SWITCH_K.index(32)
    mse = " < ".join(f"{SWITCH_MSE[name][k]}" for name in reversed(SWITCH_FLOP_MATCHED))
    claim = Claim("at equal FLOPs per token: 8 experts < 4 < 2 < TopK", f"MSE at k = 32: {mse}")
    study = pick(studies, *ORDERS)
    if study is None:
        return claim.missing(f"no runs of the study `{ORDERS[0]}`")
    return _ordered(claim, study, flop_matched(study), -1, "latents of an expert")


def _width_matched(studies: Studies) -> Claim:
    claim = Claim("at equal width: TopK < fewer experts < more experts", "16 to 128 experts, from k = 16")
    study = pick(studies, *WIDTHS)
    if study is None:
        return claim.missing(f"no runs of the study `{WIDTHS[0]}`")
    parts = [(n, part[part["k"] >= 16]) for n, part in width_matched(study)]
    return _ordered(claim, study, parts, 1, "n")


def shares(study: Study) -> list[float]:
    """Share of the steps of TopK after which a Switch SAE of equal FLOPs per token has its fvu, per cell.

    Both are read from their curves, which end before the rate decays.
    """
    found = []
    for _, part in flop_matched(study):
        for _, cells in part.groupby(["k", "seed"]):
            for _, base in cells[cells["n_experts"] == 1].iterrows():
                tokens, log_loss = _log_curve(study, base)
                for _, row in cells[cells["n_experts"] > 1].iterrows():
                    own_tokens, own_loss = _log_curve(study, row)
                    if len(tokens) and len(own_loss) and own_loss[-1] <= log_loss[-1] <= own_loss[0]:
                        at = float(np.interp(-log_loss[-1], -own_loss, own_tokens))
                        found.append(math.exp(at - tokens[-1]))
    return found


def _log_curve(study: Study, row: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """ln tokens, and ln of the lowest held-out fvu so far."""
    points = curve(study.runs.history(str(row["run_id"])), "fvu")
    return np.log(points["tokens"].to_numpy()), np.minimum.accumulate(np.log(points["loss"].to_numpy()))


def _efficiency(studies: Studies) -> Claim:
    claim = Claim("Switch SAEs reach the MSE of TopK in fewer steps", "17 to 19 % of the steps, k = 64")
    study = pick(studies, *ORDERS)
    found = [] if study is None else shares(study)
    if len(found) < 2:
        return claim.missing("curves of FLOP-matched runs")
    estimate = mean_of([100 * share for share in found])
    where = f"mean over {len(found)} FLOP-matched runs, on their curves before the rate decays"
    return claim.judged(direction(estimate, -1, of=100.0), f"{estimate} % of the steps", where, "more runs")


def published_multiplier() -> float:
    """FLOPs of TopK over those of 8 experts at the middle MSE of the paper's figure 1; as it counts, they go as n/E."""
    middle = float(np.log(SWITCH_SCALING["TopK"]).mean())
    topk, switch = (
        float(np.interp(-middle, -np.log(SWITCH_SCALING[name]), np.log(SWITCH_WIDTHS)))
        for name in ("TopK", "8 experts")
    )
    return 8 * math.exp(topk - switch)


def _compute(studies: Studies) -> list[Claim]:
    theirs = published_multiplier()
    less = Claim("at equal MSE a Switch SAE needs fewer FLOPs", "figure 1: about 10 times fewer with 8 to 64 experts")
    much = Claim(f"with 8 experts {theirs:.2g} times fewer FLOPs at equal MSE", "read from figure 1, k = 32")
    study = pick(studies, *ORDERS)
    found = {}
    if study is not None:
        k = most_cells(study)
        found = dict(on_every_axis(study.runs.where("another k", k=k), {"sae": "switch", "n_experts": 8}))
    counted, ours = found.get("flops_switch2024"), found.get("flops_core")
    if study is None or counted is None or ours is None or counted.value is None:
        return [claim.missing("three widths each of TopK and of 8 experts at one k") for claim in (less, much)]
    log = Estimate(math.log(counted.value), *(None if e is None else math.log(e) for e in (counted.lo, counted.hi)))
    n = study.runs.values("n")
    where = f"8 experts, n = {n.min():,.0f} to {n.max():,.0f}, k = {most_cells(study):g}, fixed tokens"
    where += "" if counted.at_loss is None else f", at fvu {counted.at_loss:.3g}"
    text = f"{exponential(log)} times fewer by their count"
    if ours.value is not None:
        text += f"; {Estimate(ours.value, ours.lo, ours.hi)} by ours, with router, decoder and backward"
    return [
        less.judged(direction(log, 1), text, where, "more widths"),
        much.judged(
            equals(log, math.log(theirs), math.log(2)), text, f"{where}; theirs: 2,048 to 131,072", "more widths"
        ),
    ]


# -- router -----------------------------------------------------------------------------------------------------------


def _balance(studies: Studies) -> list[Claim]:
    gain = 100 * math.log(SWITCH_BALANCE[0.0] / SWITCH_BALANCE[3.0])
    better = Claim(
        "balancing the load of the experts lowers the MSE", f"by {gain:.0f} % at α = 3 against 0, 16 experts"
    )
    even = Claim("the balance term makes the load even", "imbalance 2.03 → 1.004")
    study = pick(studies, *ROUTER)
    if study is None:
        return [claim.missing(f"no runs of the study `{ROUTER[0]}`") for claim in (better, even)]
    frame = study.runs.frame.sort_values("sae.balance_weight")
    off, on = frame[frame["sae.balance_weight"] == 0], frame[frame["sae.balance_weight"] == 0.1]
    if not len(off) or not len(on):
        return [claim.missing("runs at weights 0 and 0.1") for claim in (better, even)]
    errors = study.errors(study.runs)
    ratio = _ratio(errors, on, off)
    where = f"fvu at λ = 0.1 over that at 0, {_cell(frame)}, paired by document"
    load = " → ".join(f"{float(part['imbalance'].mean()):.3g}" for part in (off, on))
    shown = float(on["imbalance"].mean()) < 1.05 < float(off["imbalance"].mean())
    return [
        better.judged(direction(ratio, -1, of=1.0), f"ratio {ratio}", where, "more seeds"),
        even.judged(
            Verdict.SHOWN if shown else Verdict.CANNOT,
            load,
            f"E·Σf² of the last step; shown if it crosses 1.05; {_cell(frame)}",
            "no collapse without the term at this size",
        ),
    ]


def _cell(frame: pd.DataFrame) -> str:
    row = frame.iloc[0]
    return f"{row['n_experts']:g} experts, n = {row['n_latents']:,.0f}, k = {row['k']:g}, {len(frame)} runs"


STEP_RATIOS = (4.8, 5.3, 5.2)
"""Time of a step of TopK over that of Switch with 8 experts, in three calls of the bench (docs/performance.md)."""


def _wall_clock() -> Claim:
    claim = Claim("no gain in wall-clock time from experts", "their code computes every expert and masks")
    estimate = mean_of(STEP_RATIOS)
    where = "a training step with 8 experts beside TopK, d = 384, n = 8,192, k = 32, batch 8,192, two CPU cores; "
    where += "three calls (docs/performance.md)"
    return claim.judged(direction(estimate, -1, of=1.0), f"{estimate} times as fast", where, "more calls")


# -- geometry ---------------------------------------------------------------------------------------------------------


def _geometry(studies: Studies) -> list[Claim]:
    clusters = Claim("encoder rows cluster by expert, decoder rows hardly", "t-SNE, figure 4")
    copies = Claim("experts repeat each other's features: more duplicates than in TopK", "5 to 10 % above cosine 0.9")
    found = []
    for claim, make in ((clusters, _clusters), (copies, _copies)):
        options = [study for names in (ORDERS, QUALITY) if (study := pick(studies, *names)) is not None]
        made = [made for study in options if (made := make(claim, study)) is not None]
        found.append(made[0] if made else claim.missing("the metric `geometry` of Switch SAEs"))
    return found


def _clusters(claim: Claim, study: Study) -> Claim | None:
    frame = study.runs.frame
    names = ("quality.geometry.expert_purity_encoder", "quality.geometry.expert_purity")
    if not set(names) <= set(frame):
        return None
    frame = frame[(frame["n_experts"] > 1) & frame[names[0]].notna()]
    if len(frame) < 2:
        return None
    encoder, decoder = (
        mean_of((100 * (frame[name] - 1 / frame["n_experts"])).astype(float).tolist()) for name in names
    )
    gap = mean_of((100 * (frame[names[0]] - frame[names[1]])).astype(float).tolist())
    text = f"nearest rows of one's own expert, above chance: encoder {encoder}, decoder {decoder} points"
    where = f"{len(frame)} Switch SAEs of `{study.name}`; judged by the difference, {gap} points"
    return claim.judged(direction(gap, 1), text, where, "more SAEs")


def _copies(claim: Claim, study: Study) -> Claim | None:
    column = "quality.geometry.duplicates"
    frame = study.runs.frame
    if column not in frame:
        return None
    cells = frame.assign(pct=100 * frame[column].astype(float)).pivot_table(
        index=["n_latents", "k"], columns="n_experts", values="pct"
    )
    if not {1, 8} <= set(cells):
        return None
    gaps = (cells[8] - cells[1]).dropna().tolist()
    if len(gaps) < 2:
        return None
    switch, topk = (mean_of(cells[number].dropna().tolist()) for number in (8, 1))
    estimate = mean_of(gaps)
    text = f"8 experts {switch} %, TopK {topk} %, difference {estimate} points"
    where = f"latents with a neighbour above cosine 0.9, each counted once; {len(gaps)} cells of `{study.name}`"
    return claim.judged(direction(estimate, 1), text, where, "more SAEs")


# -- what has no study ------------------------------------------------------------------------------------------------


def _beyond(studies: Studies) -> list[Claim]:
    learned = Claim("a learned router beats a random one (a control of ours)", "not in the paper")
    study = pick(studies, *CONTROLS)
    if study is None or "sae.routing" not in study.runs.frame:
        control = learned.missing("SAEs with `sae.routing=hash` or `random`")
    else:
        control = _control(learned, study)
    return [
        control,
        Claim("scaling by p matters", "MSE 1118 with it, 1384 without").missing("a setting that leaves p out of x̂"),
        Claim("one expert that is always on helps", "MSE 1070 against 1100, 31 further experts").missing(
            "an architecture with a shared expert"
        ),
        Claim("latents of Switch SAEs are as easily detected from an explanation as those of TopK", "figure 6").missing(
            "a language model as judge; `detection` by an embedding says something else"
        ),
    ]


def _control(claim: Claim, study: Study) -> Claim:
    frame = study.runs.frame[study.runs.frame["n_experts"] > 1]
    routing = frame["sae.routing"].fillna("learned")
    if "sae.consistency" in frame:  # THOR trains two experts per token, so it is a control of its own
        routing = routing.where(~(frame["sae.consistency"] > 0), "THOR")
    errors = study.errors(study.runs)
    second = frame[routing == "learned"]
    estimates = {}
    for control in sorted(set(routing) - {"learned"}) if len(second) else []:
        estimates[control] = _ratio(errors, frame[routing == control], second)
    if not estimates:
        return claim.missing("runs with a learned router and a control at the same size")
    text = ", ".join(f"{name} {estimate}" for name, estimate in estimates.items())
    where = f"fvu over that of the learned router at equal FLOPs, {_cell(frame)}"
    return claim.judged(steps(list(estimates.values()), 1, of=1.0), text, where, "more seeds")


def _ratio(errors: PairedErrors | None, first: pd.DataFrame, second: pd.DataFrame) -> Estimate:
    """Geometric mean of the fvu of the first runs over that of the second."""
    logs = (runs.set_index("run_id")["fvu"].map(math.log) for runs in (first, second))
    value, ends = mean_difference(errors, *logs)
    return exponential(Estimate(value, *(ends or (None, None))))
