"""L(n) at convergence and L(n) at fixed tokens are two laws: which runs belong to which, and how many tokens it takes.

A run is *converged* when its record says so (held-out loss improved by less than ε over the last doubling of tokens at
a constant learning rate). A run belongs to the law at *fixed tokens* when its budget ended it: it was not asked to
converge, or it reached its cap first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.frames import Frame
from analysis.law import Array
from analysis.notes import Note, note
from analysis.result import FitResult, Status
from analysis.table import RunTable
from harness.errors import UserError

REGIMES = ("auto", "converged", "fixed", "all")

TOKENS = "tokens_to_convergence"
"""Column of what `convergence_table` derives."""


def one_regime(table: RunTable, want: str = "auto", possible: Callable[[RunTable], Any] = len) -> RunTable:
    """The runs at convergence, or those at fixed tokens; the others are listed as left out, with a note.

    Args:
        want: `converged`, `fixed`, `all` (both, with a note), or `auto`: the converged ones where they suffice
            (`possible`), else those at fixed tokens. A table in which all runs are of one kind is unchanged.

    Raises `UserError` for a regime of which no run is there.
    """
    assert want in REGIMES, want
    converged, fixed = _kinds(table)
    if want == "all" or (want == "auto" and (converged.all() or fixed.all())):
        return table
    if want != "auto" and not (converged if want == "converged" else fixed).any():
        other = "fixed tokens" if want == "converged" else "convergence"
        raise UserError(f"{table.name}: no run is there for regime={want!r}; all {len(table)} are at {other}")
    if want != "fixed":
        out = table.keep(converged, "not converged, so not of the law at convergence (--regime fixed for the others)")
        if want == "converged" or possible(out):
            return _noted(out, f"{int((~converged).sum())} of {len(table)} runs are not converged and were left out")
    out = table.keep(fixed, "converged, so not of the law at fixed tokens (--regime converged for those)")
    return _noted(out, f"{int((~fixed).sum())} of {len(table)} runs are converged and were left out: too few for a law")


def _noted(table: RunTable, text: str) -> RunTable:
    if text[0] != "0":
        table.notes.append(note("unconverged_run", "warning", text))
    return table


def _kinds(table: RunTable) -> tuple[np.ndarray, np.ndarray]:
    """(converged, at fixed tokens) per run; a converged run that was not asked to converge is both."""
    if not table.has("converged") or table.column("converged").isna().all():
        return np.zeros(len(table), dtype=bool), np.ones(len(table), dtype=bool)
    flags = table.column("converged")
    converged = flags.notna().to_numpy() & flags.astype(object).isin([True, 1, "True", "true"]).to_numpy()
    asked = table.frame.get("train.until")
    fixed = ~converged if asked is None else ~converged | (asked.astype(str) == "budget").to_numpy()
    return converged, fixed


def convergence_table(table: RunTable, epsilon: float | None = None) -> RunTable:
    """Tokens to convergence as the quantity to fit: roles n, k, run, and `loss` = the tokens that it took.

    Args:
        epsilon: None: where the runs themselves found convergence (their own rule, to a quarter of a doubling). Else
            from the curves: the first number of tokens at which the loss improved by less than this share over the
            last doubling, interpolated; every constant-lr run that was trained so far counts, converged or not.

    Runs for which there is no such number are listed as left out; they took longer than they were trained.
    """
    if not (table.has("d") and table.has("run")):
        raise UserError(f"{table.name}: tokens to convergence need the tokens of each run; name their column with --d")
    if epsilon is None:
        converged, _ = _kinds(table)
        tokens = np.where(converged, table.values("d"), np.nan)
        why = "not converged: it would have taken longer than it was trained"
    elif not 0 < epsilon < 1:
        raise UserError(f"epsilon={epsilon} must lie between 0 and 1")
    else:
        tokens = np.array([_tokens_at(table, row, epsilon) for _, row in table.frame.iterrows()], dtype=float)
        why = f"its curve never improved by less than {100 * epsilon:g} % over a doubling of tokens"
    found = np.isfinite(tokens)
    roles = {role: table.roles[role] for role in ("n", "k", "experts", "seed", "run") if table.has(role)}
    frame = table.frame.assign(**{TOKENS: tokens})
    out = table.but(frame=frame, roles={**roles, "loss": TOKENS}, histories={}).keep(found, why)
    if not found.all():
        text = f"{int((~found).sum())} of {len(table)} runs are not converged; they are the slow ones, so p may be low"
        out.notes.append(note("unconverged_run", "warning", text))
    return out


def _tokens_at(table: RunTable, row: Frame, epsilon: float) -> float:
    """Tokens at which one run's own curve converged; NaN where it never did, decays, or has no curve."""
    lines = table.history(str(row[table.roles["run"]]))
    loss = table.roles["loss"]
    if float(row.get("train.decay_fraction") or 0.0) > 0 or not {loss, "tokens"} <= set(lines):
        return float("nan")
    lines = lines[lines[loss].notna() & (lines[loss] > 0)]
    if "eval_rows" in lines and len(lines):  # the final evaluation is of other rows than the curve
        lines = lines[lines["eval_rows"] == lines["eval_rows"].mode().iloc[0]]
    lines = lines.drop_duplicates("tokens").sort_values("tokens")
    warm = float(row.get("train.warmup_tokens") or 0.0)
    return first_convergence(lines["tokens"].to_numpy(float), lines[loss].to_numpy(float), epsilon, warm)


def first_convergence(tokens: Array, loss: Array, epsilon: float, warmup: float = 0.0) -> float:
    """First tokens at which 1 − L(D)/L(D/2) < ε, interpolated in ln D; NaN when the curve never gets there."""
    if len(tokens) < 2:
        return float("nan")
    log_d, log_loss = np.log(tokens), np.log(loss)
    usable = tokens / 2 >= max(tokens[0], warmup)
    at = log_d[usable]
    gain = 1 - np.exp(log_loss[usable] - np.interp(at - np.log(2), log_d, log_loss))
    below = np.flatnonzero(gain < epsilon)
    if not len(below):
        return float("nan")
    i = int(below[0])
    if i == 0:
        return float(np.exp(at[0]))
    share = (gain[i - 1] - epsilon) / (gain[i - 1] - gain[i])
    return float(np.exp(at[i - 1] + share * (at[i] - at[i - 1])))


@dataclass
class Convergence:
    """Tokens to convergence of every run that converged, and D0·n^p for each k."""

    table: RunTable
    """`convergence_table`: its `loss` are tokens."""
    laws: list[tuple[float | None, FitResult]]
    """(k, fit of tokens_to_convergence) where at least three sizes converged; k is None without that role."""
    notes: list[Note]


def tokens_to_convergence(table: RunTable, epsilon: float | None = None) -> Convergence:
    """How the tokens to convergence grow with n, of one architecture, for each k apart: D0·n^p with intervals."""
    from analysis.fit import first_population, fit
    from analysis.laws import get

    law = get("tokens_to_convergence")
    found = convergence_table(first_population(table, law), epsilon)
    levels: list[float | None] = sorted(set(found.values("k"))) if found.has("k") else [None]
    laws = []
    for k in levels:
        part = found if k is None else found.where("another k", **{found.roles["k"]: k})
        result = fit(part, law)
        if result.status is not Status.FAILED:
            laws.append((k, result))
    return Convergence(found, laws, found.notes)
