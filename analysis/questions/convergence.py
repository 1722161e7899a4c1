"""How many tokens it takes to converge, and how that number grows with n."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.laws.catalogue import get
from analysis.laws.law import Array
from analysis.notes import Note, note
from analysis.runs.curves import curve, decays, repeated_rows, setting
from analysis.runs.populations import one_architecture
from analysis.runs.regime import converged_and_fixed
from analysis.runs.table import RunTable
from harness.errors import UserError

TOKENS = "tokens_to_convergence"
"""The column that `convergence_table` derives."""


def convergence_table(table: RunTable, epsilon: float | None = None) -> RunTable:
    """Tokens to convergence as the quantity to fit: roles n, k, experts, seed, run, and `loss`, which are tokens.

    Args:
        epsilon: None takes the tokens at which the runs themselves declared convergence (exact to a quarter of a
            doubling). A number takes them from the curves: the first number of tokens at which the loss improved by
            less than this share over the last doubling, interpolated. Every run with a constant learning rate that
            was trained that far counts, converged or not.

    Runs without such a number are listed as left out; they would have needed more tokens than they were trained on.
    Raises `UserError` if the table has no tokens or `epsilon` is not between 0 and 1.
    """
    if not (table.has("d") and table.has("run")):
        raise UserError(f"{table.name}: tokens to convergence need the tokens of each run; name their column with --d")
    if epsilon is None:
        converged, _ = converged_and_fixed(table)
        tokens = np.where(converged, table.values("d"), np.nan)
        why = "not converged: it would have taken longer than it was trained"
    elif not 0 < epsilon < 1:
        raise UserError(f"epsilon={epsilon} must lie between 0 and 1")
    else:
        tokens = np.array([_tokens_at(table, row, epsilon) for _, row in table.frame.iterrows()], dtype=float)
        why = f"its curve never improved by less than {100 * epsilon:g} % over a doubling of tokens"
    finite = np.isfinite(tokens)
    roles = {role: table.roles[role] for role in ("n", "k", "experts", "seed", "run") if table.has(role)}
    frame = table.frame.assign(**{TOKENS: tokens})
    out = table.but(frame=frame, roles={**roles, "loss": TOKENS}, histories={}).keep(finite, why)
    if not finite.all():
        text = f"{int((~finite).sum())} of {len(table)} runs are not converged; they are the slow ones, so p may be low"
        out.notes.append(note("unconverged_run", "warning", text))
    out.notes += repeated_rows(table)
    return out


def _tokens_at(table: RunTable, row: pd.Series, epsilon: float) -> float:
    """Tokens at which the curve of one run converged; NaN if it never did, its rate decays, or it has no curve."""
    points = curve(table.history(str(row[table.roles["run"]])), table.roles["loss"])
    if decays(row):
        return float("nan")
    tokens, losses = points["tokens"].to_numpy(), points["loss"].to_numpy()
    return first_convergence(tokens, losses, epsilon, setting(row, "train.warmup_tokens"))


def first_convergence(tokens: Array, loss: Array, epsilon: float, warmup: float = 0.0) -> float:
    """First number of tokens D at which 1 − L(D)/L(D/2) < ε, interpolated in ln D; NaN if the curve never gets there.

    Args:
        tokens: Increasing (points,).
        loss: Positive (points,).
        warmup: Tokens of the warm-up; D/2 must lie beyond it.
    """
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
    """(k, fit of D0·n^p) for each k at which at least three sizes converged; k is None if the table has no k."""
    notes: list[Note]


def tokens_to_convergence(table: RunTable, epsilon: float | None = None) -> Convergence:
    """How the tokens to convergence of one architecture grow with n: D0·n^p with intervals, for each k."""
    law = get("monomial")
    tokens = convergence_table(one_architecture(table, law), epsilon)
    levels: list[float | None] = sorted(set(tokens.values("k"))) if tokens.has("k") else [None]
    laws = []
    for k in levels:
        part = tokens if k is None else tokens.where("another k", **{tokens.roles["k"]: k})
        result = fit(part, law)
        if result.status is not Status.FAILED:
            laws.append((k, result))
    return Convergence(tokens, laws, tokens.notes)
