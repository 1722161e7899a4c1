"""Everything that a report shows: the runs of a sweep, their fits, and every comparison that they allow."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.fits.design import check_table
from analysis.fits.fit import EDGE, fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.laws.catalogue import get
from analysis.laws.law import Law
from analysis.notes import Note, any_error, note
from analysis.questions.convergence import Convergence, tokens_to_convergence
from analysis.questions.frontier import frontier, frontier_law
from analysis.questions.isoflop import IsoFlop, isoflop
from analysis.questions.learning_rate import BestRates, best_rates
from analysis.questions.multiplier import Multiplier, multiplier, on_every_axis
from analysis.questions.paired import PairedErrors, paired_errors, rises
from analysis.questions.versus import equal_n_and_flops
from analysis.runs.axes import at_equal_flops
from analysis.runs.curves import evaluations, repeated_rows
from analysis.runs.load import read_sweep
from analysis.runs.populations import at_best_rate, one_architecture, settings, varied
from analysis.runs.regime import one_regime
from analysis.runs.study import Study, read_study
from analysis.runs.table import RunTable
from harness.errors import UserError

BEYOND = (2.0, 4.0, 8.0)
"""Sizes to forecast, in units of the largest n of the runs."""


@dataclass
class Comparison:
    """TopK against Switch at one k and number of experts."""

    k: float
    experts: float
    x: str
    """`flops` or `n`: the axis of the comparison."""
    multiplier: Multiplier
    by_axis: list[tuple[str, Multiplier]] = field(default_factory=list)
    """For `flops`: the same comparison on every axis of `analysis.runs.axes.AXES` that the runs have."""


@dataclass
class Findings:
    """Everything that a report shows, before it is laid out."""

    table: RunTable
    """All usable runs."""
    shown: RunTable
    """Those of one setting (model, hook, layer …): of the largest if there are several. Pictures and comparisons are
    of these."""
    main: RunTable
    """Those to which the law is fitted: of one regime (at convergence, or at fixed tokens), at their best learning
    rate, and of TopK if there are any."""
    study: Study
    setting: str = ""
    """What sets `shown` apart from other settings, e.g. "hook=mlp_out"; empty if there is only one."""
    others: list[Findings] = field(default_factory=list)
    """The laws of the other settings."""
    fits: list[tuple[float | None, FitResult]] = field(default_factory=list)
    """(k, fit); k is None for a law in n and k."""
    failures: list[FitResult] = field(default_factory=list)
    """Fits that were tried and were not possible."""
    blind: list[tuple[float | None, FitResult]] = field(default_factory=list)
    """The same laws fitted without the largest n."""
    forecasts: list[dict[str, Any]] = field(default_factory=list)
    """The law beyond the largest n: n, k, value, mean (lo, hi), new (lo, hi), extrapolation, notes."""
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)
    """`analysis.runs.curves.evaluations` of all usable runs."""
    front: pd.DataFrame = field(default_factory=pd.DataFrame)
    front_fit: FitResult | None = None
    isoflops: list[tuple[float, IsoFlop]] = field(default_factory=list)
    convergence: Convergence | None = None
    versus: list[dict[str, Any]] = field(default_factory=list)
    paired: PairedErrors | None = None
    """None if the runs keep no sums per held-out document."""
    comparisons: list[Comparison] = field(default_factory=list)
    rates: BestRates | None = None
    """Best learning rates, if several were tried at some n and k."""
    notes: list[Note] = field(default_factory=list)


def gather(directory: Path, law: str | None = None) -> Findings:
    """Read a sweep and fit everything that it allows. Raises `UserError` if the directory holds no run."""
    table = at_equal_flops(read_runs(directory))
    study = read_study(directory)
    if law is not None:
        study.law = law
    chosen = get(study.law)
    regime = one_regime(table, "auto", lambda part: _fits(part, chosen))
    parts = settings(regime)
    whole = settings(table)
    everything = [
        Findings(table, whole.get(name, part), one_architecture(at_best_rate(part), chosen), study, name)
        for name, part in parts.items()
    ]
    for each in everything:
        _fit_laws(each, chosen)
    findings, *findings.others = everything
    findings.paired = paired_errors(table)
    part = parts[findings.setting]
    compared = at_best_rate(part)
    if len(compared) < len(part):
        findings.rates = best_rates(one_architecture(part, chosen), findings.paired)
    shown = findings.shown
    findings.forecasts = [row for k, result in findings.fits for row in _forecasts(findings.main, k, result)]
    findings.curves = evaluations(shown)
    findings.front = frontier(shown, findings.curves)
    if len(findings.front) > 4:
        attempt = frontier_law(shown, findings.curves, resamples=200)
        findings.front_fit = attempt if attempt.status is not Status.FAILED else None
    findings.isoflops = _isoflops(findings.main)
    if shown.has("converged") and shown.column("converged").eq(True).any():
        findings.convergence = tokens_to_convergence(shown)
    findings.comparisons = compared_architectures(compared)
    findings.versus = equal_n_and_flops(compared, findings.paired)
    findings.notes = _notes(findings)
    return findings


def _fits(table: RunTable, law: Law) -> bool:
    return not any_error(check_table(one_architecture(table, law), law))


def _notes(findings: Findings) -> list[Note]:
    laws = [findings, *findings.others]
    notes = [entry for each in laws for _, result in each.fits for entry in result.notes]
    notes += [entry for each in laws for result in each.failures for entry in result.notes]
    notes += findings.table.notes
    notes += [entry for row in findings.forecasts for entry in row["notes"]]
    notes += findings.rates.notes if findings.rates is not None else []
    notes += [entry for _, profiles in findings.isoflops for entry in profiles.notes]
    notes += findings.convergence.notes if findings.convergence is not None and findings.convergence.laws else []
    if findings.front_fit is not None:
        notes += [entry for entry in findings.front_fit.notes if entry.code == "frontier_owned_by_end"]
        notes += repeated_rows(findings.shown)
    notes += rises(findings.main, findings.paired)
    also = varied(findings.main) if findings.others else varied(findings.table)
    if also:
        notes.append(note("mixed_population", "warning", f"the runs also differ in {', '.join(also[:6])}"))
    return list(dict.fromkeys(notes))


def read_runs(directory: Path) -> RunTable:
    """The runs of a sweep directory; runs of its study that were never started are listed as left out."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name a sweep directory, e.g. runs/quick")
    table = read_sweep(directory)
    missing = [run for run in read_study(directory).runs if run not in table.directories]
    if missing:
        rows = pd.DataFrame({table.roles["run"]: missing, "reason": "part of the study, never started"})
        table.excluded = pd.concat([part for part in (table.excluded, rows) if len(part)], ignore_index=True)
    return table


def _fit_laws(findings: Findings, law: Law) -> None:
    """Fit the study's law; if that is not possible, a floor law in n for each k that allows it."""
    main = findings.main
    levels = sorted(set(main.values("k"))) if len(main) else []
    attempts: list[tuple[float | None, RunTable, list[str]]]
    if "k" in law.inputs:
        attempts = [(None, main, [law.name])]
    elif "experts" in law.inputs:
        attempts = [(k, main.where("another k", k=k), [law.name]) for k in levels]
    else:
        attempts = []
    for k, part, names in attempts:
        _attempt(findings, k, part, names)
    if findings.fits:
        return
    for k in levels:
        part = main.where("another k", k=k)
        part = part.but(roles={**part.roles, "x": part.roles["n"]})
        _attempt(findings, k, part, ["power_floor", "power"])


def _attempt(findings: Findings, k: float | None, part: RunTable, names: list[str]) -> None:
    """Fit the first possible law of `names`, also without the largest n; keep the first failure if none is possible."""
    results = [fit(part, name) for name in names]
    best = next((result for result in results if result.status is not Status.FAILED), None)
    if best is None:
        findings.failures.append(results[0])
        return
    findings.fits.append((k, best))
    for row in best.excluded:
        if row["reason"].endswith(EDGE):
            out = findings.main.column("run").astype(str) == row["run"]
            findings.main = findings.main.keep(~out.to_numpy(), row["reason"])
    part = part.keep(part.column("run").isin(findings.main.column("run")).to_numpy(), "left out of the law")
    n = part.values("n")
    blind = fit(part.keep(n < n.max(), "held out"), best.law, ci="wald", edges="keep")
    if blind.status is not Status.FAILED:
        findings.blind.append((k, blind))


def _forecasts(table: RunTable, k: float | None, result: FitResult) -> list[dict[str, Any]]:
    """The law at the sizes `BEYOND` the largest n, with the bands of the mean and of a new run."""
    if "experts" in result.law.inputs or ("d" in result.law.inputs and not result.converges):
        return []
    largest = table.values("n").max()
    rows = []
    for level in sorted(set(table.values("k"))) if k is None else [k]:
        n = largest * np.array(BEYOND)
        sizes = [name for name in result.law.inputs if name != "d"]  # without tokens: at convergence
        inputs = {name: np.full(len(n), level) if name == "k" else n for name in sizes}
        mean, new = (result.forecast(inputs, kind) for kind in ("mean", "new_run"))
        for i, size in enumerate(n):
            row = {"n": float(size), "k": float(level), "extrapolation": float(mean["extrapolation"][i])}
            row |= {"value": float(mean["value"][i]), "notes": result.band_notes(mean)}
            row |= {name: (float(band["lo"][i]), float(band["hi"][i])) for name, band in (("mean", mean), ("new", new))}
            rows.append(row)
    return rows


def _isoflops(table: RunTable) -> list[tuple[float, IsoFlop]]:
    """The best n at each budget, for every k whose constant-rate curves or equal budgets allow it."""
    isoflops = []
    for k in sorted(set(table.values("k"))) if len(table) else []:
        with suppress(UserError):  # too few sizes with constant-rate curves at this k
            profiles = isoflop(table.where("another k", k=k))
            if len(profiles.minima):
                isoflops.append((k, profiles))
    return isoflops


def compared_architectures(table: RunTable, at_loss: float | None = None) -> list[Comparison]:
    """TopK against Switch in FLOPs and in n, for every k and number of experts at which both have enough sizes."""
    if "sae" not in table.frame or not {"topk", "switch"} <= set(table.frame["sae"]):
        return []
    comparisons = []
    experts = sorted(set(table.frame.loc[table.frame["sae"] == "switch", table.roles["experts"]]))
    for k in sorted(set(table.values("k"))):
        for count in experts:
            switch = {"sae": "switch", table.roles["experts"]: count}
            for x in ("flops", "n"):
                with suppress(UserError):  # too few sizes of one of them at this k
                    part = table.where("another k", k=k)
                    found = multiplier(part, second=switch, x=x, at_loss=at_loss)
                    by_axis = on_every_axis(part, switch, found.at_loss) if x == "flops" else []
                    comparisons.append(Comparison(k, float(count), x, found, by_axis))
    return comparisons
