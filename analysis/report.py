"""`report.html` of a sweep: the law in words, pictures, tables, what was left out, provenance. Self-contained."""

from __future__ import annotations

import datetime
import json
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from analysis.cells import cell_rows, cell_text
from analysis.fit import fit
from analysis.frames import Frame, pd
from analysis.frontier import frontier, frontier_law
from analysis.laws import get
from analysis.learning_rate import BestRates, at_best_rate, best_rates
from analysis.load import evaluations, read_sweep, varied
from analysis.multiplier import Multiplier, multiplier
from analysis.notes import Note, note
from analysis.pictures import all_pictures
from analysis.result import FitResult, Status
from analysis.table import RunTable
from analysis.versus import equal_n_and_flops
from analysis.words import (
    comparison_sentences,
    converged_words,
    interval,
    law_sentences,
    multiplier_sentences,
    number,
    rate_sentences,
)
from harness.errors import UserError
from harness.record.files import write_text_atomic

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass
class Study:
    """What a sweep says about itself."""

    name: str
    title: str
    question: str = ""
    law: str = "sae_nk"
    runs: tuple[str, ...] = ()
    """Every run that was asked for, started or not."""


@dataclass
class Findings:
    """Everything that a report shows, before it is laid out."""

    table: RunTable
    """All usable runs."""
    main: RunTable
    """The population that the law is about: TopK where there is any."""
    study: Study
    fits: list[tuple[float | None, FitResult]] = field(default_factory=list)
    """(k, fit): k is None for a law in n and k."""
    failures: list[FitResult] = field(default_factory=list)
    """Fits that were tried and not possible."""
    curves: Frame = field(default_factory=pd.DataFrame)
    front: Frame = field(default_factory=pd.DataFrame)
    front_fit: FitResult | None = None
    versus: list[dict[str, Any]] = field(default_factory=list)
    multipliers: list[tuple[float, Multiplier]] = field(default_factory=list)
    """(k, comparison of TopK with Switch in FLOPs)."""
    rates: BestRates | None = None
    """Best learning rates, where several were tried at one n and k."""
    notes: list[Note] = field(default_factory=list)


def write_report(sweep_dir: str | Path, law: str | None = None) -> Path:
    """Write `report.html` into a sweep directory and return its path.

    A sweep with too little to fit still gets a report, which says what is missing. Raises `UserError` when the
    directory holds no run at all.
    """
    from jinja2 import Environment, StrictUndefined

    directory = Path(sweep_dir)
    findings = gather(directory, law)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["num"] = number
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**_context(findings, directory))
    path = directory / "report.html"
    write_text_atomic(path, page)
    return path


def summary_table(sweep: str | Path | RunTable, limit: int = 40) -> str:
    """A short text table of the cells of a sweep, for the terminal."""
    table = sweep if isinstance(sweep, RunTable) else _read(Path(sweep))
    return cell_text(table, limit)


def gather(directory: Path, law: str | None = None) -> Findings:
    """Read a sweep and fit what can be fitted."""
    table = _read(directory)
    study = read_study(directory)
    if law is not None:
        study.law = law
    population = _main_population(table)
    main = at_best_rate(population)
    findings = Findings(table=table, main=main, study=study)
    if len(main) < len(population):
        findings.rates = best_rates(population)
    _fit_laws(findings)
    findings.curves = evaluations(table)
    findings.front = frontier(table, findings.curves)
    if len(findings.front) > 4:
        attempt = frontier_law(table, findings.curves, resamples=200)
        findings.front_fit = attempt if attempt.status is not Status.FAILED else None
    findings.multipliers = _multipliers(table)
    findings.versus = equal_n_and_flops(table)
    extra = findings.rates.notes if findings.rates is not None else []
    if findings.front_fit is not None:
        extra = [*extra, *(entry for entry in findings.front_fit.notes if entry.code == "frontier_owned_by_end")]
    findings.notes = list(dict.fromkeys([n for result in _all_fits(findings) for n in result.notes] + extra))
    differing = varied(table)
    if differing:
        text = f"the runs also differ in {', '.join(differing[:6])}"
        findings.notes.append(note("mixed_population", "warning", text))
    return findings


def read_study(directory: Path) -> Study:
    """`study.json` or `study.yaml` of a sweep directory; a plain description of it when there is none."""
    for name in ("study.json", "study.yaml"):
        path = directory / name
        if not path.exists():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            if name.endswith("json"):
                content = json.loads(text)
            else:
                import yaml

                content = yaml.safe_load(text)
            said = {key: str(content[key]) for key in ("name", "title", "question", "law") if content.get(key)}
        except (ValueError, AttributeError, OSError) as problem:
            raise UserError(f"{path} cannot be read: {str(problem).splitlines()[0]}; mend or remove it") from None
        return Study(
            name=said.get("name", directory.name),
            title=said.get("title", f"Sweep {directory.resolve().name}"),
            question=said.get("question", ""),
            law=get(said.get("law", "sae_nk")).name,
            runs=tuple(map(str, content.get("runs") or ())),
        )
    return Study(directory.name, f"Sweep {directory.resolve().name}")


def _read(directory: Path) -> RunTable:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; name a sweep directory, e.g. runs/quick")
    table = read_sweep(directory)
    missing = [run for run in read_study(directory).runs if run not in table.directories]
    if missing:
        rows = pd.DataFrame({table.roles["run"]: missing, "reason": "asked for, not started"})
        table.excluded = pd.concat([part for part in (table.excluded, rows) if len(part)], ignore_index=True)
    return table


def _main_population(table: RunTable) -> RunTable:
    if "sae" not in table.frame or not len(table):
        return table
    counts = table.frame["sae"].astype(str).value_counts()
    return table.where("another architecture", sae="topk" if "topk" in counts.index else str(counts.index[0]))


def _fit_laws(findings: Findings) -> None:
    """The study's law; where that is not possible, a floor law in n for each k that allows it."""
    main, law = findings.main, findings.study.law
    inputs = set(get(law).inputs)
    if inputs <= {"n", "k"} and inputs != {"n"}:
        result = fit(main, law)
        if result.status is not Status.FAILED:
            findings.fits.append((None, result))
            return
        findings.failures.append(result)
    levels = sorted(set(main.values("k"))) if len(main) else []
    for k in levels:
        part = main.where(f"k is not {k:g}", k=k)
        part = part.but(roles={**part.roles, "x": part.roles["n"]})
        attempts = [fit(part, name) for name in ("power_floor", "power")]
        best = next((attempt for attempt in attempts if attempt.status is not Status.FAILED), None)
        if best is not None:
            findings.fits.append((k, best))
        else:
            findings.failures.append(attempts[0])


def _multipliers(table: RunTable) -> list[tuple[float, Multiplier]]:
    """TopK against Switch in FLOPs for every k at which both have enough sizes."""
    if "sae" not in table.frame or not {"topk", "switch"} <= set(table.frame["sae"]):
        return []
    found = []
    for k in sorted(set(table.values("k"))):
        with suppress(UserError):  # too few sizes of one of them at this k: nothing to say
            found.append((k, multiplier(at_best_rate(table.where("another k", k=k)))))
    return found


def _all_fits(findings: Findings) -> list[FitResult]:
    return [result for _, result in findings.fits] + findings.failures


def _context(findings: Findings, directory: Path) -> dict[str, Any]:
    table, study = findings.table, findings.study
    words = converged_words(table)
    title = study.title
    if words and "converged" not in title.lower():
        title = f"{title} — {words}"
    return {
        "title": title,
        "study": study,
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "lead": _lead(findings),
        "pictures": all_pictures(findings),
        "laws": [_law_rows(k, result) for k, result in findings.fits],
        "failures": _failure_rows(findings),
        "versus": findings.versus,
        "multipliers": [_multiplier_row(k, entry) for k, entry in findings.multipliers],
        "rates": findings.rates.rates.to_dict("records") if findings.rates is not None else [],
        "cells": cell_rows(table),
        "anchors": _anchors(table),
        "excluded": _excluded_rows(table),
        "notes": [entry.as_dict() for entry in sorted(findings.notes, key=lambda e: e.severity == "info")],
        "provenance": _provenance(table, directory),
    }


def _lead(findings: Findings) -> list[str]:
    """The short text on top."""
    table, main = findings.table, findings.main
    lines = []
    if not len(table):
        return [
            f"No run of this sweep can be used: all {len(table.excluded)} were left out (listed below). "
            "Nothing was fitted."
        ]
    n, k, tokens = main.values("n"), main.values("k"), table.values("d")
    loss = main.values("loss")
    lines.append(
        f"{len(table)} run{'s' if len(table) > 1 else ''}: n {_range(n)}, k {_range(k)}, {_range(tokens)} tokens each. "
        f"Held-out fvu {_range(loss)}; the mean predictor has 1."
    )
    for level, result in findings.fits:
        at = f"k = {level:g}: " if level is not None else ""
        lines.extend(at + sentence for sentence in law_sentences(result, list(k)))
    if not findings.fits:
        lines.append("No law can be fitted to these runs; the section “What could not be fitted” says why.")
    lines.extend(comparison_sentences(findings.versus))
    lines.extend(multiplier_sentences(findings.multipliers))
    if findings.rates is not None:
        lines.extend(rate_sentences(findings.rates))
    if "topk" not in set(table.frame.get("sae", [])):
        lines.append("There is no TopK run, so architectures cannot be compared.")
    return lines


def _range(values: Any) -> str:
    """ "256 to 4,096", or one number where all are equal."""
    low, high = (number(float(end)) for end in (np.min(values), np.max(values)))
    return low if low == high else f"{low} to {high}"


def _law_rows(k: float | None, result: FitResult) -> dict[str, Any]:
    rows = [
        {"name": name, "value": number(result.values[name], 4), "interval": interval(*result.intervals[name], digits=4)}
        for name in result.law.params
    ]
    return {
        "name": result.law.name,
        "formula": result.law.formula,
        "k": k,
        "status": result.status.value,
        "rows": rows,
        "level": f"{100 * result.level:g} %",
        "ci": result.ci,
        "reached": f"{100 * result.reached:.0f} % of {result.starts}",
        "weighted": bool(result.weighting),
        "nested": [row for row in result.nested if k is None or "aicc" in row],
    }


def _multiplier_row(k: float, entry: Multiplier) -> dict[str, str]:
    return {
        "k": number(k),
        "value": "–" if entry.value is None else number(entry.value),
        "interval": interval(entry.lo, entry.hi),
        "at": "every loss" if entry.at_loss is None else f"fvu {number(entry.at_loss)}",
        "p": number(entry.p_shared, 2),
        "exponents": f"{number(entry.exponents[0])} / {number(entry.exponents[1])}",
        "floor": number(entry.floor) + ("" if entry.floor_identified else " (may be zero)"),
        "crossing": "none in the data" if entry.crossing is None else f"{number(entry.crossing)} FLOPs",
    }


def _failure_rows(findings: Findings) -> list[dict[str, str]]:
    rows = []
    for result in findings.failures:
        for entry in result.notes:
            if entry.severity == "error":
                rows.append({"law": result.law.name, "why": entry.message, "remedy": entry.remedy})
    return [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]


def _anchors(table: RunTable) -> list[dict[str, Any]]:
    """fvu of the mean predictor, and of PCA with k components, as the runs recorded it."""
    found: dict[float, float] = {}
    for entry in table.frame.get("pca_fvu", pd.Series(dtype=object)):
        if isinstance(entry, dict):
            found |= {float(k): float(value) for k, value in entry.items() if value is not None}
    best = table.frame.groupby(table.roles["k"])[table.roles["loss"]].min() if len(table) else {}
    return [{"k": k, "pca": found[k], "best": best.get(k)} for k in sorted(found)]


def _excluded_rows(table: RunTable) -> list[dict[str, str]]:
    run = table.roles["run"]
    return [{"run": str(row[run]), "reason": str(row["reason"])} for _, row in table.excluded.iterrows()]


def _provenance(table: RunTable, directory: Path) -> list[tuple[str, str]]:
    """Entries of the runs' `provenance.json` as (name, value); values in which runs differ are listed."""
    seen: dict[str, list[str]] = {}
    for run in table.directories.values():
        path = run / "provenance.json"
        if not path.exists():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        for key, value in content.items() if isinstance(content, dict) else ():
            text = "; ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            known = seen.setdefault(key, [])
            if text not in known:
                known.append(text)
    shorten = lambda values: " | ".join(values[:3]) + (f" | … ({len(values)} different)" if len(values) > 3 else "")  # noqa: E731
    return [("sweep", directory.resolve().name)] + [(key, shorten(values)) for key, values in sorted(seen.items())]
