"""The last lines of a report at the terminal: the law in words."""

from __future__ import annotations

from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.report.findings import Findings
from analysis.report.words import floor_word
from harness.errors import UserError


def closing_lines(findings: Findings) -> list[str]:
    """How fvu falls with n, a line for each of a few k; or that no law was fitted, and why."""
    if not findings.fits:
        reasons = [
            f"{note.message}; {note.remedy}"
            for result in findings.failures
            for note in result.notes
            if note.severity == "error"
        ]
        return [f"no law was fitted: {reasons[0]}" if reasons else "no law was fitted"]
    lines = []
    for level, result in findings.fits:
        ks = sorted(set(findings.main.values("k"))) if level is None else [level]
        lines += [line for k in ks if (line := _slope_line(result, k))]
    return lines


def _slope_line(result: FitResult, k: float) -> str:
    """`fvu falls as n^-0.31 (95 %: -0.34 to -0.28) at k = 32`; empty for a law without one exponent in n."""
    along = "n" if "n" in result.law.inputs else "x"
    try:
        value, low, high = result.slope(along, at={"k": k})
    except UserError:
        return ""
    what = "fvu" if result.law.floor is None else f"fvu above its {floor_word(result)}"
    within = f" ({100 * result.level:g} %: {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    doubt = "; this fit is not reliable, the report says why" if result.status is Status.UNRELIABLE else ""
    return f"{what} {'falls' if value < 0 else 'grows'} as n^{value:.2f}{within} at k = {k:g}{doubt}"
