"""`report.html` of a sweep: the law in words, pictures, tables, excluded runs, provenance. It is self-contained."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.format import interval, number
from analysis.questions.multiplier import Multiplier
from analysis.report.architectures import architecture_rows, architecture_sentences
from analysis.report.cells import cell_rows
from analysis.report.findings import Comparison, Findings, gather
from analysis.report.pictures import all_pictures
from analysis.report.planned import planned_rows
from analysis.report.quality import quality_section
from analysis.report.words import (
    comparison_sentences,
    converged_words,
    convergence_sentences,
    floors_words,
    forecast_sentences,
    law_sentences,
    losses_words,
    multiplier_sentences,
    rate_sentences,
    standing,
)
from analysis.runs.axes import AXES, axis_words
from analysis.runs.curves import seen
from analysis.runs.populations import differing
from analysis.runs.table import RunTable
from harness.errors import UserError
from harness.files import write_text_atomic
from harness.record import names

DOUBTS = (
    *("untuned_rates", "one_data_order", "identical_repeats", "edge_rows", "one_cell_decides", "large_residuals"),
    *("structured_residuals", "lack_of_fit"),
)
"""Notes on fits that belong before the numbers: no interval holds what they say."""

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write_report(
    sweep_dir: str | Path,
    law: str | None = None,
    out: str | Path | None = None,
    findings: Findings | None = None,
) -> Path:
    """Write the report of a sweep directory, by default its `report.html`, and return the path.

    A sweep with too little to fit still gets a report, which says what is missing. Raises `UserError` if the directory
    holds no run or the report cannot be written. `findings`: what `gather` found in it, if that is known.
    """
    from jinja2 import Environment, StrictUndefined

    directory = Path(sweep_dir)
    path = directory / "report.html" if out is None else Path(out)
    path = path / "report.html" if path.is_dir() else path
    findings = findings or gather(directory, law)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["num"] = number
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**_context(findings, directory))
    try:
        write_text_atomic(path, page)
    except OSError as problem:
        raise UserError(f"{path} cannot be written: {problem.strerror}; choose another file with --out") from problem
    return path


def _context(findings: Findings, directory: Path) -> dict[str, Any]:
    table, study = findings.table, findings.study
    words = converged_words(findings.main)
    title, failures = study.title, _failure_rows(findings)
    told = {row["why"] for row in failures}
    if words and "converged" not in title.lower():
        title = f"{title} — {words}"
    return {
        "title": title,
        "study": study,
        "written": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "lead": _lead(findings),
        "pictures": all_pictures(findings),
        "quality": quality_section(findings.shown),
        "laws": [_law_rows(each.setting, k, result) for each in _laws(findings) for k, result in each.fits],
        "failures": failures,
        "versus": findings.versus,
        "architectures": architecture_rows(findings),
        "forecasts": [_forecast_row(row) for row in findings.forecasts],
        "forecast_from": [standing(result)[0] for _, result in findings.fits],
        "comparisons": [_comparison_row(entry) for entry in findings.comparisons],
        "axes": [_axis_row(entry, *found) for entry in findings.comparisons for found in entry.by_axis],
        "axis": axis_words(findings.table.roles),
        "convergence": _convergence_rows(findings),
        "rates": findings.rates.rates.to_dict("records") if findings.rates is not None else [],
        "cells": cell_rows(table),
        "differs": bool(differing(table)),
        "planned": planned_rows(table, directory),
        "anchors": _anchors(table),
        "excluded": _excluded_rows(findings),
        "notes": [
            entry.as_dict()
            for entry in sorted(findings.notes, key=lambda e: e.severity == "info")
            if entry.message not in told
        ],
        "provenance": _provenance(table, directory),
    }


def _laws(findings: Findings) -> list[Findings]:
    """The findings of every setting, the largest first."""
    return [findings, *findings.others]


def _lead(findings: Findings) -> list[str]:
    """The text at the top: what the law does not hold for, then the law."""
    table, main = findings.table, findings.main
    if not len(table):
        return [
            f"No run of this sweep can be used: all {len(table.excluded)} were left out (listed below). "
            "Nothing was fitted."
        ]
    lines = _cautions(findings)
    n, k, tokens = main.values("n"), main.values("k"), main.values("d")
    loss = main.values("loss")
    of = f" with {findings.setting}" if findings.setting else ""
    lines.append(
        f"{len(main)} run{'s' if len(main) > 1 else ''}{of}: n {_range(n)}, k {_range(k)}, {_range(tokens)} tokens "
        f"each. Held-out fvu {_range(loss)}; the mean predictor has 1."
    )
    for each in _laws(findings):
        for level, result in each.fits:
            parts = [each.setting] if each.setting else []
            parts += [f"k = {level:g}"] if level is not None else []
            sentences = law_sentences(result, list(each.main.values("k")))
            lines.extend(": ".join([*parts, sentence]) for sentence in sentences)
        if not each.fits:
            what = f"the runs with {each.setting}" if each.setting else "these runs"
            lines.append(f"No law can be fitted to {what}; the section “What could not be fitted” says why.")
    regimes = {result.regime for _, result in findings.fits}
    doubtful = any(result.status is Status.UNRELIABLE for _, result in findings.fits)
    lines.extend(forecast_sentences(findings.forecasts, regimes.pop() if len(regimes) == 1 else "", doubtful))
    lines.extend(architecture_sentences(findings))
    lines.extend(comparison_sentences(findings.versus, findings.paired, axis_words(main.roles)))
    lines.extend(multiplier_sentences(findings.comparisons))
    if findings.convergence is not None:
        lines.extend(convergence_sentences(findings.convergence))
    if findings.rates is not None:
        lines.extend(rate_sentences(findings.rates))
    if findings.paired is not None:
        lines.append(findings.paired.sentence())
    if "topk" not in set(table.frame.get("sae", pd.Series(dtype=object)).astype(str)):
        lines.append("There is no TopK run, so architectures cannot be compared.")
    return lines


def _cautions(findings: Findings) -> list[str]:
    """What a reader must know before the law: which runs it is of, how they differ, what was left out."""
    table = findings.table
    lines = []
    if findings.others:
        keys = " and ".join(part.partition("=")[0] for part in findings.setting.split(", "))
        every = "; ".join(f"{each.setting} ({len(each.main)} runs)" for each in _laws(findings))
        lines.append(
            f"The runs differ in {keys}. Each setting has a law of its own: {every}. Pictures, forecasts and "
            f"comparisons are of {findings.setting}."
        )
    lines.extend(_told(findings, ("worse_than_mean", "mixed_population")))
    if findings.rates is not None:
        lines.append("Several learning rates were run: the law is of the best one in each cell.")
    fitted, total = sum(len(each.main) for each in _laws(findings)), len(table) + len(table.excluded)
    if fitted < total:
        out = len(_excluded_rows(findings))
        others = total - fitted - out
        which = [f"{out} {'is' if out == 1 else 'are'} listed under “Left out”"] if out else []
        which += [f"{others} of other architectures are in the comparisons and cells"] if others > 0 else []
        lines.append(f"{fitted} of {total} runs were fitted; {' and '.join(which)}.")
    lines.extend(_told(findings, DOUBTS))
    if seen(table):
        lines.append(seen(table))
    return list(dict.fromkeys(lines))


def _told(findings: Findings, codes: Collection[str]) -> list[str]:
    """The notes with these codes as sentences, without those that other sentences say."""
    return [
        f"{entry.message[0].upper()}{entry.message[1:]}."
        for entry in findings.notes
        if entry.code in codes
        and entry.severity != "info"
        and not (findings.others and "each setting" in entry.message)
    ]


def _range(values: Any) -> str:
    """ "256 to 4,096", or one number if all values are equal."""
    low, high = (number(float(end)) for end in (np.min(values), np.max(values)))
    return low if low == high else f"{low} to {high}"


def _law_rows(setting: str, k: float | None, result: FitResult) -> dict[str, Any]:
    rows = [
        {"name": name, "value": number(result.values[name], 4), "interval": interval(*result.intervals[name], digits=4)}
        for name in result.law.params
    ]
    return {
        "name": result.law.name,
        "formula": result.law.formula,
        "setting": setting,
        "points": result.points,
        "k": k,
        "status": result.status.value,
        "rows": rows,
        "level": f"{100 * result.level:g} %",
        "ci": result.ci,
        "reached": f"{100 * result.reached:.0f} % of {result.starts}",
        "weighted": bool(result.weighting),
        "influences": [(e.where, e.values, f"{e.shift:.2f}") for e in result.influences],
        "nested": [row for row in result.nested if k is None or "aicc" in row],
    }


def _comparison_row(entry: Comparison) -> dict[str, str]:
    result = entry.multiplier
    unit = AXES.get(result.axis, "FLOPs") if entry.x == "flops" else "latents"
    crossing = f"{number(result.crossing)} {unit} {interval(result.crossing_lo, result.crossing_hi)}"
    return {
        "k": number(entry.k),
        "experts": number(entry.experts),
        "of": unit,
        "value": "–" if result.value is None else number(result.value),
        "interval": interval(result.lo, result.hi),
        "at": losses_words(result, "fvu"),
        "p": number(result.p_shared, 2),
        "exponents": f"{number(result.exponents[0])} / {number(result.exponents[1])}",
        "floor": floors_words(result) + ("" if result.floor_identified else "; it may be zero"),
        "crossing": "none in the data" if result.crossing is None else crossing,
    }


def _axis_row(entry: Comparison, axis: str, result: Multiplier) -> dict[str, Any]:
    value, said = result.value, entry.multiplier.value
    return {
        "k": number(entry.k),
        "experts": number(entry.experts),
        "axis": AXES[axis],
        "value": "–" if value is None else number(value),
        "interval": interval(result.lo, result.hi),
        "at": losses_words(result, "fvu"),
        "contradicts": value is not None and said is not None and (value - 1) * (said - 1) < 0,
    }


def _forecast_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "k": number(row["k"]),
        "n": number(row["n"]),
        "value": number(row["value"]),
        "mean": interval(*row["mean"]),
        "new": interval(*row["new"]),
        "extrapolation": f"{row['extrapolation']:.2f}",
    }


def _convergence_rows(findings: Findings) -> list[dict[str, str]]:
    laws = findings.convergence.laws if findings.convergence is not None else []
    return [
        {
            "k": "–" if k is None else number(k),
            "runs": str(law.points),
            "p": f"{number(law.values['p'])} {interval(*law.intervals['p'])}",
            "d0": f"{number(law.values['D0'])} {interval(*law.intervals['D0'])}",
        }
        for k, law in laws
    ]


def _failure_rows(findings: Findings) -> list[dict[str, str]]:
    rows = []
    for result in (result for each in _laws(findings) for result in each.failures):
        for entry in result.notes:
            if entry.severity == "error":
                rows.append({"law": result.law.name, "why": entry.message, "remedy": entry.remedy})
    return [dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)]


def _anchors(table: RunTable) -> list[dict[str, Any]]:
    """fvu of PCA with k components, as the runs recorded it, and the best fvu at that k."""
    pca: dict[float, float] = {}
    for entry in table.frame.get("pca_fvu", pd.Series(dtype=object)):
        if isinstance(entry, dict):
            pca |= {float(k): float(value) for k, value in entry.items() if value is not None}
    best = table.frame.groupby(table.roles["k"])[table.roles["loss"]].min() if len(table) else {}
    return [{"k": k, "pca": pca[k], "best": best.get(k)} for k in sorted(pca)]


def _excluded_rows(findings: Findings) -> list[dict[str, str]]:
    """Unusable runs, then usable runs that did not enter the law."""
    table = findings.table
    rows = table.left_out()
    unusable = {row["run"] for row in rows}
    for row in (row for each in _laws(findings) for row in each.main.left_out()):
        if row["run"] not in unusable and not row["reason"].startswith("another "):
            rows.append({"run": row["run"], "reason": f"{row['reason']} (shown in the comparisons and cells)"})
    return rows


def _provenance(table: RunTable, directory: Path) -> list[tuple[str, str]]:
    """The entries of the runs' `provenance.json` as (name, value), the first values if runs differ; and which
    activations were left out."""
    seen: dict[str, list[str]] = {}
    for run in table.directories.values():
        try:
            content = json.loads((run / names.PROVENANCE).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # missing, damaged or not ours to read: the page says what the others have
            continue
        for key, value in content.items() if isinstance(content, dict) else ():
            text = "; ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
            values = seen.setdefault(key, [])
            if text not in values:
                values.append(text)
    if dropped := _dropped_rows(table):
        seen["activations"] = dropped
    return [("sweep", directory.resolve().name), *((key, _shortened(values)) for key, values in sorted(seen.items()))]


def _dropped_rows(table: RunTable) -> list[str]:
    """What the runs' notes say of rows of massive norm that were left out, each text once."""
    noted: Any = table.frame.get("notes", ())
    texts = [line.partition(" ")[2] for lines in noted if isinstance(lines, list) for line in lines]
    return list(dict.fromkeys(text for text in texts if text.startswith("dropped ")))


def _shortened(values: list[str]) -> str:
    """At most three values, and their number if there are more."""
    return " | ".join(values[:3]) + (f" | … ({len(values)} different)" if len(values) > 3 else "")
