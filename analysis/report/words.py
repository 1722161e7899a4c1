"""Sentences about results, with numbers and intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.format import interval, number
from analysis.notes import has
from analysis.questions.convergence import Convergence
from analysis.questions.learning_rate import BestRates
from analysis.questions.multiplier import Multiplier
from analysis.questions.need import floor_interval
from analysis.questions.paired import PairedErrors
from analysis.questions.versus import mean_ratio
from analysis.report.findings import Comparison
from analysis.runs.axes import AXES
from analysis.runs.table import RunTable
from harness.terminal import say

Slope = tuple[float, float | None, float | None]

WORSE_FORM = 2.0
"""AICc above that of a simpler form from which on the simpler one describes the runs better."""


def doubling(slope: Slope) -> str:
    """By how much a doubling lowers a quantity with that log-log slope: "13.1 % [12.4, 13.9]"."""
    value, low, high = (None if end is None else 100 * (1 - 2**end) for end in slope)
    ends = "" if low is None or high is None else f" [{high:.1f}, {low:.1f}]"
    return f"{value:.1f} %{ends}"


def law_sentences(result: FitResult, ks: Sequence[float]) -> list[str]:
    """The law in words: the gain of a doubling of n at each k, the floor, the residuals."""
    if result.status is Status.FAILED:
        return []
    part = "reducible loss" if result.law.floor is not None else "loss"
    sentences = []
    if result.status is Status.UNRELIABLE:
        sentences.append("This fit is not reliable: read the notes of severity error before using its numbers.")
    if "k" in result.law.inputs:
        steps = [f"{doubling(result.slope('n', at={'k': k}))} at k = {k:g}" for k in _few(ks)]
        sentences.append(f"Doubling n lowers the {part} by {_and(steps)}.")
    elif result.law.inputs == ("x",):
        sentences.append(f"Doubling {_short(result)} lowers the {part} by {doubling(result.slope('x'))}.")
    if result.law.floor is not None:
        sentences.append(_floor_sentence(result, ks))
    if result.dof > 0:
        spread = 100 * math.sqrt(result.variance)
        sentences.append(f"Runs scatter by {spread:.2g} % around the law ({result.sample()}).")
    return sentences + _simpler(result)


def _simpler(result: FitResult) -> list[str]:
    """That a nested form describes the runs better, if one does."""
    rows = [row for row in result.nested if "aicc" in row and math.isfinite(row["delta_aicc"])]
    own = next((row["delta_aicc"] for row in rows if row["law"] == result.law.name), 0.0)
    if own < WORSE_FORM:
        return []
    best = min(rows, key=lambda row: row["aicc"])["law"]
    return [f"The simpler form {best} describes these runs better: its AICc is lower by {own:.1f}."]


def _short(result: FitResult) -> str:
    column = result.columns.get(result.law.scale_input, result.law.scale_input)
    return {"n_latents": "n", "flops": "the FLOPs"}.get(column, column)


def floor_word(result: FitResult) -> str:
    """What the floor of a fit is: "floor", or "level at this budget" of runs that were not trained to convergence."""
    return "level at this budget" if level_only(result) else "floor"


def level_only(result: FitResult) -> bool:
    """Whether the record says that a floor may be what the budget of tokens left."""
    return any(entry.code == "level_at_budget" and entry.severity != "info" for entry in result.notes)


def standing(result: FitResult) -> list[str]:
    """What must go with every number from a fit: its status, the regime of its runs, its notes."""
    regime = f", runs: {result.regime}" if result.regime else ""
    return [f"from {result.law.name}, status {result.status.value}{regime}", *map(str, result.notes)]


def _floor_sentence(result: FitResult, ks: Sequence[float]) -> str:
    """What the reducible loss lies above, and by how much the loss itself still falls with n."""
    above = f"The reducible loss is what lies above a {floor_word(result)}"
    if has(result.notes, "floor_not_identified"):
        return f"{above}, which is not identified: these sizes do not show whether the fall ends."
    name = result.law.scale_input
    largest, few = result.domain[name][1], _few(ks) if "k" in result.law.inputs else [None]
    floors, falls = [], []
    for k in few:
        at, where = ({"k": k}, f" at k = {k:g}") if k is not None else ({}, "")
        inputs = {name: np.array([largest / 2, largest])} | {key: np.full(2, value) for key, value in at.items()}
        floor, ends = float(result.floor(inputs)[-1]), floor_interval(result, {name: largest, **at})
        floors.append(f"{floor:.3g} {interval(*ends)}{where}")
        before, after = result.value(inputs)
        falls.append(f"{100 * (1 - after / before):.1f} %{where}")
    why = ". It is what this number of tokens leaves, not the floor of converged SAEs" if level_only(result) else ""
    last = f"The last doubling of {_short(result)} (to {number(largest)}) lowers the loss itself by {_and(falls)}."
    return f"{above} of {_and(floors)}{why}. {last}"


def comparison_sentences(rows: Sequence[dict], errors: PairedErrors | None = None, axis: str = "") -> list[str]:
    """TopK against Switch at equal n and at equal FLOPs: mean ratios of loss over the cells that allow them.

    Args:
        errors: Paired errors of the runs, for intervals of the means.
        axis: What the FLOPs count, in words.
    """
    sentences = []
    for name, text in (("n", "the same n and k"), ("flops", f"the same k and {axis or 'training FLOPs'}")):
        found = mean_ratio(list(rows), name, errors)
        if found is None:
            continue
        ratios = np.array([row[f"ratio_{name}"] for row in rows if row.get(f"ratio_{name}") is not None])
        change, word = 100 * (found[0] - 1), "higher" if found[0] >= 1 else "lower"
        certain, scope, missing = "", "", len(rows) - len(ratios)
        if found[1] is not None:
            ends = sorted(100 * (end - 1) * (1 if change >= 0 else -1) for end in found[1])
            certain = f" [{ends[0]:.2f}, {ends[1]:.2f}]".replace("-", "−")
            repeats = ""
            if errors is not None and errors.repeat_sd is not None:
                which = f", all of {errors.repeated[0]} SAEs" if len(errors.repeated) == 1 else ""
                repeats = f" and the noise between repeats ({errors.repeat_dof} degrees of freedom{which})"
            scope = f" The interval is for these cells; it holds the error of the held-out sample{repeats}."
        cells = "in the one cell that can be compared"
        if len(ratios) > 1:
            ends_text = f"{100 * (ratios.min() - 1):+.1f} to {100 * (ratios.max() - 1):+.1f}".replace("-", "−")
            of = (
                f"the {len(ratios)} of {len(rows)} cells that lie between TopK's sizes"
                if missing
                else f"{len(ratios)} cells"
            )
            cells = f"on average over {of}, in which it is {ends_text} %"
        sentences.append(f"At {text}, Switch has {abs(change):.1f} %{certain} {word} fvu than TopK {cells}.{scope}")
    return sentences


def losses_words(result: Multiplier, loss: str) -> str:
    """At which values of `loss` a multiplier holds."""
    return "every loss of these runs" if result.at_loss is None else f"{loss} {number(result.at_loss)}"


def multiplier_sentences(comparisons: Sequence[Comparison]) -> list[str]:
    """How much compute Switch saves, for each k and number of experts, and whether that depends on the axis."""
    sentences = []
    for entry in comparisons:
        result = entry.multiplier
        if result.value is None or entry.x != "flops":
            continue
        what = AXES.get(result.axis, "training FLOPs")
        where = losses_words(result, "fvu")
        more, less = "TopK", f"Switch with {entry.experts:g} experts"
        times, ends = result.value, (result.lo, result.hi)
        if result.value < 1:
            more, less = less, more
            times, ends = 1 / times, (_inverse(result.hi), _inverse(result.lo))
        settled = "" if ends[0] is not None and ends[0] > 1 else "; which of them needs less is not settled"
        shared = f"a shared exponent is {'not ' if result.p_shared >= 0.05 else ''}rejected, p = "
        sentences.append(
            f"k = {entry.k:g}: for {where}, {more} needs {number(times)} {interval(*ends)} times the {what} of "
            f"{less}{settled} ({floors_words(result)}; {shared}{number(result.p_shared, 2)})."
        )
        other = [
            f"{number(m.value)} {interval(m.lo, m.hi)} in {AXES[axis]}"
            for axis, m in entry.by_axis
            if _contradicts(m.value, result.value)
        ]
        if other:
            own = f"{number(result.value)} {interval(result.lo, result.hi)} in {what}"
            said = f"This claim depends on what is counted: the compute of TopK over that of Switch is {own}, but"
            sentences.append(f"{said} {_and(other)}.")
    return sentences


def floors_words(result: Multiplier) -> str:
    """Whether a common floor was used, and what the other way gives."""
    word, p = result.floor_word, number(result.p_floor, 2)
    apart = f"a {word} for each, {number(result.floors[0])} and {number(result.floors[1])}"
    common = f"a common {word}"
    used, other = f"{common}, p = {p}", apart
    if result.own_floors:
        used, other = f"{apart}, as a common one has p = {p}", common
    if result.otherwise is None or result.otherwise[0] is None:
        return f"with {used}; with {other}, there is no number"
    value, low, high = result.otherwise
    return f"with {used}; with {other}, TopK / Switch is {number(value)} {interval(low, high)}"


def _contradicts(value: float | None, other: float) -> bool:
    """Whether two multipliers say that different architectures need less."""
    return value is not None and (value - 1) * (other - 1) < 0


def convergence_sentences(convergence: Convergence) -> list[str]:
    """How the tokens to convergence grow with n."""
    return [
        f"{'' if k is None else f'k = {k:g}: '}tokens to convergence go as n^{number(law.values['p'])} "
        f"{interval(*law.intervals['p'])} ({law.points} converged runs)."
        for k, law in convergence.laws
    ]


def forecast_sentences(rows: Sequence[dict], regime: str = "", unreliable: bool = False) -> list[str]:
    """The loss that a new run is expected to reach at the first size beyond the data, for each k.

    Args:
        regime: Of the runs behind the law, as `FitResult.regime`.
        unreliable: Whether that is the status of the law.
    """
    if not rows:
        return []
    first = min(row["n"] for row in rows)
    forecasts = [
        f"{number(row['value'])} {interval(*row['new'])} at k = {row['k']:g}"
        for row in rows
        if row["n"] == first and all(map(math.isfinite, row["new"]))
    ]
    if not forecasts:
        return []
    same = ", with the tokens of these runs" if regime == "fixed tokens" else ""
    where = f"at n = {number(first)}, twice the largest{same}"
    doubt = "From a fit that is not reliable: forecast" if unreliable else "Forecast"
    return [f"{doubt} for a new run {where}, with 95 % intervals if the law holds there: fvu {_and(forecasts)}."]


def rate_sentences(best: BestRates) -> list[str]:
    """How the best learning rate falls with n."""
    if best.law is None:
        return ["Too few cells bracket their best learning rate to give its slope in n."]
    low, high = best.law.intervals["p"]
    sentences = [f"The best learning rate goes as n^{number(best.law.values['p'])} {interval(low, high)}."]
    as_good = best.rates["as_good"].dropna()
    if (as_good > 0).any():
        sentences.append(
            f"In {int((as_good > 0).sum())} of {len(as_good)} cells another rate is as good within the error "
            f"of the difference."
        )
    return sentences


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def converged_words(table: RunTable) -> str:
    """ "converged", "not converged" or "partly converged", from the records of the runs; "" if unknown."""
    if not table.has("converged") or not len(table):
        return ""
    flags = table.column("converged")
    if flags.isna().all():
        return ""
    flags = flags.fillna(False).astype(bool)
    return "converged" if flags.all() else "partly converged" if flags.any() else "not converged"


def _few(ks: Sequence[float]) -> list[float]:
    """At most three values: the smallest, a middle one, the largest."""
    ordered = sorted(set(ks))
    return ordered if len(ordered) <= 3 else [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def refuse(result: FitResult, table: RunTable) -> int:
    """1 if a fit was not possible, and the reasons go to stderr; else 0."""
    if result.status is not Status.FAILED:
        return 0
    say(f"no fit of {result.law.name} to {table.name}:")
    for line in [*map(str, result.notes), *left_out(result)]:
        say(f"  {line}")
    return 1


def used(result: FitResult) -> list[str]:
    """Lines that say which runs were fitted, and which were left out and why."""
    runs = sorted(set(result.runs))
    total = len(runs) + len(result.excluded)
    return [f"used: {len(runs)} of {total} runs ({_some(runs)})", *left_out(result)]


def left_out(result: FitResult) -> list[str]:
    """Lines with the number of excluded runs, the reasons and some of the names; none if all runs are used. Runs of
    another architecture or setting are counted apart: they have a law of their own."""
    runs: dict[str, list[str]] = {}
    for entry in result.excluded:
        runs.setdefault(entry["reason"], []).append(entry["run"])
    lines = []
    for title, elsewhere in (("of other populations", True), ("left out", False)):
        reasons = {reason: names for reason, names in runs.items() if reason.startswith("another ") is elsewhere}
        if reasons:
            lines.append(f"{title}: {sum(map(len, reasons.values()))} run(s)")
            ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
            lines.extend(f"  {len(names)} × {reason} ({_some(names)})" for reason, names in ordered)
    return lines


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
