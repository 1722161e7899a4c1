"""Numbers and columns for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest entry: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def si(value: float) -> str:
    """A count in three digits with a decimal prefix: 3.15M."""
    rounded = float(f"{value:.3g}")
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= factor:
            return f"{rounded / factor:.3g}{unit}"
    return f"{rounded:.3g}"


def listed(parts: Sequence[str], most: int = 5) -> str:
    """The first few of a list that may be long: `a; b and 7 more`."""
    shown = "; ".join(parts[:most])
    return f"{shown} and {len(parts) - most} more" if len(parts) > most else shown
