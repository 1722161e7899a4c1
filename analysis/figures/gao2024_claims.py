"""Gao et al. 2024: what the paper claims, and what our runs say."""

from __future__ import annotations

import math

import pandas as pd

from analysis.figures.claims import Claim, Estimate, Verdict, difference, direction, equals, mean_of, slope, steps
from analysis.figures.published import GAO_CONVERGENCE, GAO_LAW, GAO_RATE
from analysis.figures.tables import Studies, Study, pick
from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.notes import has
from analysis.questions.convergence import TOKENS, Convergence, tokens_to_convergence
from analysis.questions.learning_rate import BestRates, best_rates
from analysis.questions.sparsity import at_equal_l0, order
from analysis.runs.table import RunTable

LAW = ("gao2024_convergence", "gao2024_nk")
BASELINES = ("gao2024_activations", "gao2024_baselines")
RATES = ("gao2024_learning_rate", "lr_width")
DEAD = ("gao2024_dead",)
QUALITY = ("quality",)

EXPONENT_TOLERANCE = 0.2
RATE_TOLERANCE = 0.25


def claims(studies: Studies) -> list[Claim]:
    """Every claim of the paper that has a study here, or would need one."""
    return [*_law(studies), *_rate(studies), *_dead(studies), *_activations(studies), *_quality(studies), *_beyond()]


def no_runs(studies: tuple[str, ...]) -> str:
    """What is missing where a study has no runs."""
    return f"no runs of the study `{studies[0]}`"


# -- L(n, k) and convergence ------------------------------------------------------------------------------------------


def law_fits(study: Study) -> tuple[FitResult, FitResult]:
    """Of the converged runs (the law with its floor, the law to read: the one without, if the data do not bound a
    floor)."""
    floored, plain = (fit(study.runs, name, regime="converged") for name in ("sae_nk", "sae_nk_no_floor"))
    open_floor = floored.status is Status.FAILED or has(floored.notes, "floor_not_identified")
    return floored, plain if open_floor else floored


def parameter(result: FitResult, name: str) -> Estimate:
    """A parameter of a fit; open if the fit failed."""
    return Estimate(result.values[name], *result.intervals[name])


def _law(studies: Studies) -> list[Claim]:
    gamma = Claim("γ < 0: more latents help more at large k", f"γ = {GAO_LAW['gamma']:g} for GPT-4")
    eta = Claim("η < 0: the floor falls with k", f"η = {GAO_LAW['eta']:g} for GPT-4")
    grows = Claim("tokens to convergence grow as a power of n", f"n^{GAO_CONVERGENCE:g} for GPT-2 small")
    study = pick(studies, *LAW)
    if study is None:
        return [claim.missing(no_runs(LAW)) for claim in (gamma, eta, grows)]
    floored, chosen = law_fits(study)
    return [_gamma(gamma, chosen), _eta(eta, floored, chosen is not floored), _grows(grows, study)]


def _span(table: RunTable) -> str:
    ends = [(role, table.values(role).min(), table.values(role).max()) for role in ("n", "k")]
    return ", ".join(f"{role} = {low:,.0f}" + (f" to {high:,.0f}" if high > low else "") for role, low, high in ends)


def _gamma(claim: Claim, result: FitResult) -> Claim:
    if result.status is Status.FAILED:
        return claim.missing(str(result.notes[0]))
    estimate = parameter(result, "gamma")
    domain = ", ".join(f"{name} = {low:g} to {high:g}" for name, (low, high) in result.domain.items())
    where = f"`{result.law.name}` on {result.points} converged runs, {domain}; fit {result.status.value}"
    verdict = direction(estimate, -1) if result.status.usable else Verdict.CANNOT
    needed = "an interval below 0 of a fit that is sound: more sizes at convergence"
    return claim.judged(verdict, f"γ = {estimate}", where, needed)


def _eta(claim: Claim, result: FitResult, open_floor: bool) -> Claim:
    needed = "the runs reach no floor: n ≫ d at convergence, over 30 min a run on two cores"
    if open_floor:
        return claim.missing(needed)
    estimate = parameter(result, "eta")
    verdict = direction(estimate, -1) if result.status.usable else Verdict.CANNOT
    return claim.judged(verdict, f"η = {estimate}", f"`{result.law.name}`, {result.points} converged runs", needed)


EPSILONS = (0.01, 0.02, 0.03, 0.05)


def convergence(study: Study) -> tuple[Convergence, float]:
    """Tokens to convergence of every run, and the gain per doubling of tokens below which a run counts as converged.

    It is the smallest of `EPSILONS` that every run reached, so that no run is left out for being slow; else the
    largest. The paper does not state its criterion.
    """
    found = [(tokens_to_convergence(study.runs, epsilon), epsilon) for epsilon in EPSILONS]
    return next((entry for entry in found if len(entry[0].table) == len(study.runs)), found[-1])


def _grows(claim: Claim, study: Study) -> Claim:
    found, epsilon = convergence(study)
    if not len(found.table):
        return claim.missing("curves of runs at a constant learning rate")
    estimate = slope(found.table.frame, TOKENS, "n_latents", ["k"])
    where = f"first gain below {100 * epsilon:g} % per doubling, {len(found.table)} of {len(study.runs)} runs, "
    where += f"one exponent for all k, {_span(found.table)}"
    verdict = equals(estimate, GAO_CONVERGENCE, EXPONENT_TOLERANCE)
    needed = f"an interval of ± {EXPONENT_TOLERANCE:g} or less: more sizes"
    return claim.judged(verdict, f"n^{estimate}", where, needed)


# -- learning rate ----------------------------------------------------------------------------------------------------


def rates(study: Study) -> BestRates:
    """The best learning rate at each n."""
    return best_rates(study.runs, study.errors(study.runs))


def _rate(studies: Studies) -> list[Claim]:
    claim = Claim("the learning rate falls with n", f"largest stable rate ∝ n^{GAO_RATE:g}")
    study = pick(studies, *RATES)
    if study is None:
        return [claim.missing(no_runs(RATES))]
    found = rates(study)
    inside = int(found.rates["bracketed"].sum())
    if found.law is None:
        return [claim.missing(f"the best of the rates lies inside those tried at {inside} of {len(found.rates)} sizes")]
    estimate = parameter(found.law, "p")
    where = f"best rates, bracketed at {inside} of {len(found.rates)} sizes, {_span(study.runs)}"
    needed = f"an interval of ± {RATE_TOLERANCE:g} or less: more sizes and seeds"
    return [claim.judged(equals(estimate, GAO_RATE, RATE_TOLERANCE), f"n^{estimate}", where, needed)]


# -- dead latents -----------------------------------------------------------------------------------------------------

DEAD_CELL = ("sae.init", "sae.aux_alpha", "train.lr_factor")


def dead_table(study: Study) -> pd.DataFrame:
    """The runs at the lowest learning rate of the study, with `dead_pct`."""
    frame = study.runs.frame
    frame = frame[frame["train.lr_factor"] == frame["train.lr_factor"].min()]
    return frame.assign(dead_pct=100 * frame["dead_frac"].astype(float)).reset_index(drop=True)


def _dead(studies: Studies) -> list[Claim]:
    aux = Claim("AuxK leaves fewer latents dead", "90 % without measures, 7 % with both, at 16M latents")
    init = Claim("an encoder that begins tied to the decoder leaves fewer latents dead", "figure 15")
    both = Claim("with both measures hardly a latent is dead", "7 % at 16M latents")
    study = pick(studies, *DEAD)
    if study is None:
        return [claim.missing(no_runs(DEAD)) for claim in (aux, init, both)]
    frame = dead_table(study)
    tied, helped = frame["sae.init"] == "tied", frame["sae.aux_alpha"] > 0
    where = f"{_span(study.runs)}, {len(frame)} runs of {frame['tokens'].iloc[0]:,.0f} tokens, noise between seeds"
    needed = "more seeds"

    def effect(mask: pd.Series, given: pd.Series) -> Estimate:
        return difference(frame, "dead_pct", mask & given, ~mask & given, DEAD_CELL)

    by_aux = {"tied": effect(helped, tied), "untied": effect(helped, ~tied)}
    by_init = {"with AuxK": effect(tied, helped), "without": effect(tied, ~helped)}
    level = mean_of(frame["dead_pct"][tied & helped].tolist())
    found = []
    for claim, effects in ((aux, by_aux), (init, by_init)):
        text = ", ".join(f"{name}: {estimate} points" for name, estimate in effects.items())
        found.append(claim.judged(steps(list(effects.values()), -1), text, where, needed))
    # what 7 % of 16 million are is not what 7 % of a few thousand are: the claim here is that the level lies below it
    found.append(both.judged(direction(level, -1, of=7.0), f"{level} %", f"tied, AuxK; {where}", needed))
    return found


# -- activation functions ---------------------------------------------------------------------------------------------


def equal_l0(study: Study) -> list[dict[str, object]]:
    """Per architecture the mean ratio of its fvu to that of TopK at equal n and at its L0."""
    errors = study.errors(study.runs)
    return order(at_equal_l0(study.runs, errors), "n", errors)


BASELINE_NAMES = {"relu": "ReLU", "gated": "Gated", "prolu": "ProLU"}


def _activations(studies: Studies) -> list[Claim]:
    study = pick(studies, *BASELINES)
    worse = [Claim(f"at equal L0, {name} reconstructs worse than TopK", "figure 2") for name in BASELINE_NAMES.values()]
    multi = Claim("Multi-TopK is slightly worse than TopK at its own k", "figure 10")
    more = Claim("Multi-TopK goes on to improve with more latents than it was trained for, TopK hardly", "figure 10")
    shrinks = Claim("refined activations of ReLU go up, those of TopK hardly move", "shrinkage")
    if study is None:
        return [claim.missing(no_runs(BASELINES)) for claim in (*worse, multi, more, shrinks)]
    ratios = {str(row["sae"]): row for row in equal_l0(study)}
    found = []
    for sae, claim in (*zip(BASELINE_NAMES, worse, strict=True), ("multi_topk", multi)):
        if sae not in ratios:
            found.append(claim.missing(f"no run of {sae} has an L0 between those of TopK"))
            continue
        row = ratios[sae]
        ends = row["ends"] if isinstance(row["ends"], tuple) else (None, None)
        estimate = Estimate(float(str(row["ratio"])), *ends)
        where = f"fvu over that of TopK at the measured L0, {row['cells']} of its cells, {_span(study.runs)}, paired"
        needed = "an interval that leaves out 1"
        found.append(claim.judged(direction(estimate, 1, of=1.0), f"ratio {estimate}", where, needed))
    return [*found, _progressive(more, study), _shrinkage(shrinks, study)]


def _paired_by_k(frame: pd.DataFrame, column: str, first: str, second: str) -> list[float]:
    """Differences of `column` between two architectures, over the cells that both have."""
    cells = frame.pivot_table(index=["n_latents", "k"], columns="sae", values=column)
    if not {first, second} <= set(cells):
        return []
    return (cells[first] - cells[second]).dropna().tolist()


def _progressive(claim: Claim, study: Study) -> Claim:
    needed = "the metric `progressive` of two or more cells"
    columns = ["quality.progressive.fvu_4k", "quality.progressive.fvu_k"]
    if not set(columns) <= set(study.runs.frame):
        return claim.missing(needed)
    frame = study.runs.frame
    gain = (frame[columns[0]].astype(float) / frame[columns[1]].astype(float)).map(math.log)
    differences = _paired_by_k(frame.assign(gain=100 * gain), "gain", "multi_topk", "topk")
    if len(differences) < 2:
        return claim.missing(needed)
    estimate = mean_of(differences)
    text = f"ln fvu(4k)/fvu(k) of Multi-TopK minus that of TopK: {estimate} %"
    return claim.judged(direction(estimate, -1), text, f"mean over {len(differences)} cells of equal n and k", needed)


def _shrinkage(claim: Claim, study: Study) -> Claim:
    needed = "the metric `refinement` of two or more cells"
    column = "quality.refinement.log_ratio"
    if column not in study.runs.frame:
        return claim.missing(needed)
    frame = study.runs.frame
    relu, topk = (
        (100 * frame[column][frame["sae"] == name].dropna().astype(float)).tolist() for name in ("relu", "topk")
    )
    differences = _paired_by_k(frame.assign(change=100 * frame[column].astype(float)), "change", "relu", "topk")
    if len(differences) < 2:
        return claim.missing(needed)
    estimate = mean_of(differences)
    text = f"mean change: ReLU {mean_of(relu)} %, TopK {mean_of(topk)} %; difference {estimate}"
    return claim.judged(direction(estimate, 1), text, f"{len(differences)} cells of equal n and target", needed)


# -- feature quality --------------------------------------------------------------------------------------------------

QUALITIES: tuple[tuple[str, str, str, int], ...] = (
    ("downstream loss (KL) falls with n", "quality.downstream.kl", "figure 5", -1),
    ("probe loss falls with n", "quality.probes.loss", "figure 6", -1),
    ("explanations by n-grams recall more of a latent with larger n", "quality.explanations.recall", "figure 6", 1),
    ("a latent's ablation touches fewer logits with larger n", "quality.ablation.sparsity", "figure 9", -1),
)
"""Claim, column, where, and the sign of its slope in n. Their abstract: these measures generally improve with size."""


def _quality(studies: Studies) -> list[Claim]:
    study = pick(studies, *QUALITY)
    found = []
    for text, column, figure, sign in QUALITIES:
        claim = Claim(text, figure)
        if study is None or column not in study.runs.frame or study.runs.frame[column].notna().sum() < 5:
            found.append(claim.missing(f"{no_runs(QUALITY)} that were judged by `{column.split('.')[1]}`"))
        else:
            found.append(_in_size(claim, study, column, sign))
    return found


def quality_slope(study: Study, column: str, size: str) -> Estimate:
    """Slope of ln(`column`) in ln n or ln k, the other held, one level per architecture."""
    frame = study.runs.frame
    frame = frame[frame[column].notna()]
    other = "k" if size == "n_latents" else "n_latents"
    return slope(frame, column, size, [other, *(["sae"] if frame["sae"].nunique() > 1 else [])])


def _in_size(claim: Claim, study: Study, column: str, sign: int) -> Claim:
    in_n, in_k = (quality_slope(study, column, size) for size in ("n_latents", "k"))
    count = int(study.runs.frame[column].notna().sum())
    where = f"slopes of the logarithm, {count} SAEs of `{study.name}` at fixed tokens, {_span(study.runs)}"
    text = f"in ln n {in_n}; in ln k {in_k}"
    return claim.judged(direction(in_n, sign), text, where, "more sizes and seeds, at convergence")


def _beyond() -> list[Claim]:
    """What two cores cannot show, whatever the study."""
    return [
        Claim("L(C) follows a power law with a floor", "0.09 + 0.056·C^−0.084 for GPT-4").missing(
            "compute over several decades at a constant rate; C is in a unit that the paper does not state"
        ),
        Claim("larger subject models need more latents", "figure 4").missing(
            "several language models of one family; here one small model of each kind is at hand"
        ),
        Claim("without measures 90 % of the latents die", "at 16M latents").missing(
            "n in the millions: at n = 2,048 far fewer die"
        ),
    ]
