"""L(n) at convergence and L(n) at fixed tokens are two laws. Here the runs of one are told from those of the other.

A run is *converged* when its record says so: its held-out loss improved by less than ε over the last doubling of
tokens at a constant learning rate. A run belongs to the law at *fixed tokens* when its budget ended it: it was not
asked to converge, or it reached its cap first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from analysis.notes import note
from analysis.runs.table import RunTable
from harness.errors import UserError

REGIMES = ("auto", "converged", "fixed", "all")


def one_regime(table: RunTable, want: str = "auto", possible: Callable[[RunTable], Any] = len) -> RunTable:
    """The runs at convergence, or those at fixed tokens; the others are listed as left out, with a note.

    Args:
        want: `converged`, `fixed`, `all` (both, with a note), or `auto`: the converged runs if they suffice, else
            those at fixed tokens. `auto` leaves a table unchanged if all its runs are of one kind.
        possible: Whether a table of converged runs suffices.

    Raises `UserError` if no run is of the regime `want`.
    """
    assert want in REGIMES, want
    converged, fixed = converged_and_fixed(table)
    if want == "all" or (want == "auto" and (converged.all() or fixed.all())):
        return table
    if want != "auto" and not (converged if want == "converged" else fixed).any():
        other = "fixed tokens" if want == "converged" else "convergence"
        raise UserError(f"{table.name} has no run for regime={want!r}; all {len(table)} are at {other}")
    if want != "fixed":
        out = table.keep(converged, "not converged, so not of the law at convergence (--regime fixed for the others)")
        if want == "converged" or possible(out):
            text = f"{int((~converged).sum())} of {len(table)} runs are not converged and were left out"
            return _with_note(out, text)
    out = table.keep(fixed, "converged, so not of the law at fixed tokens (--regime converged for those)")
    text = f"{int((~fixed).sum())} of {len(table)} runs are converged and were left out: too few for a law"
    return _with_note(out, text)


def _with_note(table: RunTable, text: str) -> RunTable:
    if text[0] != "0":
        table.notes.append(note("unconverged_run", "warning", text))
    return table


def converged_and_fixed(table: RunTable) -> tuple[np.ndarray, np.ndarray]:
    """Two masks (runs,): converged, and at fixed tokens. A run that converged without being asked to is both."""
    if not table.has("converged") or table.column("converged").isna().all():
        return np.zeros(len(table), dtype=bool), np.ones(len(table), dtype=bool)
    converged = table.column("converged").eq(True).to_numpy()
    until = table.frame.get("train.until")
    fixed = ~converged if until is None else ~converged | (until.astype(str) == "budget").to_numpy()
    return converged, fixed


def regime_words(table: RunTable) -> str:
    """`converged`, `fixed tokens` or `mixed`, of the runs of a law that does not follow tokens; "" if unknown."""
    if table.has("converged") and table.column("converged").notna().any():
        converged, fixed = converged_and_fixed(table)
        return "fixed tokens" if fixed.all() else "converged" if converged.all() else "mixed"
    if table.has("d") and len(table):
        tokens = table.use("d").values("d")
        return "fixed tokens" if len(tokens) == len(table) and np.ptp(np.log(tokens)) < 0.05 else "mixed"
    return ""
