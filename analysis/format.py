"""Numbers and intervals as text, for the terminal and the report."""

from __future__ import annotations

import math

Interval = tuple[float | None, float | None]
"""(low, high); None for an open end, which the data do not bound."""


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading: `digits` significant digits, thousands grouped, a power of ten from a million on."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) < 1e-300:  # smaller powers of ten are 0 in float64
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-4:
        exponent = math.floor(math.log10(abs(value)))
        mantissa = f"{value / 10**exponent:.{digits - 1}f}".rstrip("0").rstrip(".")
        superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa}·10{superscript}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def interval(low: float | None, high: float | None, digits: int = 3) -> str:
    """[low, high]; an open end is shown as "open"."""
    if low is None and high is None:
        return "[open]"
    left = "[open" if low is None else f"[{number(low, digits)}"
    right = "open]" if high is None else f"{number(high, digits)}]"
    return f"{left}, {right}"
