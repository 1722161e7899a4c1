"""Checks of a table before a law is fitted to it: is a fit possible, and what will limit it?"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.laws.law import Law
from analysis.notes import Note, by_severity, note
from analysis.runs.curves import last_doubling, repeated_rows
from analysis.runs.populations import POPULATION
from analysis.runs.table import RunTable

DEAD_RANGE = 0.05
"""Range of the shares of dead latents above which they differ between runs."""
DEAD_MOST = 0.10
"""Share of dead latents above which a run has too many."""
SAME_TOKENS = 1.05
"""Ratio of the most to the fewest tokens up to which runs count as equally long."""
CONVERGED_GAIN = 0.01
"""Relative gain over the last doubling of tokens above which a run without a `converged` flag is not converged."""

EPSILON = "train.convergence_epsilon"
"""The column with the gain over a doubling of tokens below which a run counts as converged."""
SURE = 2.0
"""Standard errors by which the gain of a converged run should lie below that."""


def check_table(table: RunTable, law: Law) -> list[Note]:
    """Notes on the data and the design for one law, most severe first; an error means that no fit is possible."""
    return by_severity([*table.notes, *_counts(table, law), *_data(table, law), *_population(table, law)])


def _counts(table: RunTable, law: Law) -> list[Note]:
    notes = []
    points, size = len(table), len(law.params)
    for role in law.inputs:
        levels = table.frame[table.roles[role]].nunique() if table.has(role) else 0
        needed = law.min_levels.get(role, 2)
        if levels < needed:
            text = f"{law.name} needs at least {needed} values of {table.roles.get(role, role)}, found {levels}"
            notes.append(note("too_few_levels", "error", text))
    if points <= size:
        text = f"{points} usable run(s) for the {size} parameters of {law.name}; at least {size + 1} are needed"
        notes.append(note("too_few_points", "error", text))
    elif points < size + 3:
        text = f"{points} runs for {size} parameters leave {points - size} degree(s) of freedom: intervals are wide"
        notes.append(note("too_few_points", "warning", text))
    columns = [*(table.roles[role] for role in law.inputs if table.has(role)), *_experts(table)]
    if points and columns and not table.frame.duplicated(columns).any():
        text = "no cell was repeated with another seed: the noise is judged from the fit"
        notes.append(note("single_seed", "info", text))
    return notes


def _data(table: RunTable, law: Law) -> list[Note]:
    frame, notes = table.frame, []
    if not len(frame):
        return notes
    if any(table.roles[role] in table.spent for role in (*law.inputs, "loss") if table.has(role)):
        notes += repeated_rows(table)
    if "d" in law.inputs:
        pass  # the law itself says what further tokens bring
    elif table.has("converged") and frame[table.roles["converged"]].notna().any():
        converged = frame[table.roles["converged"]].eq(True)
        if not converged.all():
            severity = "warning" if converged.any() else "info"
            text = f"{int((~converged).sum())} of {len(frame)} runs are not converged"
            notes.append(note("unconverged_run", severity, text))
        notes += _unsure(table, converged)
    elif table.histories:
        steep = [run for run, gain in last_doubling(table).items() if gain > CONVERGED_GAIN]
        if steep:
            text = f"{len(steep)} run(s) still gained more than 1 % over their last doubling of tokens, e.g. {steep[0]}"
            notes.append(note("unconverged_run", "warning" if len(steep) < len(frame) else "info", text))
    if table.has("dead"):
        dead = table.values("dead")
        dead = dead[np.isfinite(dead)]
        if len(dead) and (np.ptp(dead) > DEAD_RANGE or dead.max() > DEAD_MOST):
            text = f"dead latents range from {100 * dead.min():.1f} % to {100 * dead.max():.1f} %"
            notes.append(note("mixed_dead_latents", "warning", text))
    known = table.use("n", "flops")
    if known.has("n") and known.has("flops") and len(known) > 3:
        log_n, log_c = np.log(known.values("n")), np.log(known.values("flops"))
        design = np.stack([np.ones_like(log_n), log_n], axis=1)
        residual = log_c - design @ np.linalg.lstsq(design, log_c, rcond=None)[0]
        if np.ptp(log_n) > 0 and np.std(residual) < 0.02 * np.std(log_c):
            notes.append(note("confounded_n_flops", "info", "FLOPs follow from n alone in these runs"))
    return notes


def _unsure(table: RunTable, converged: pd.Series) -> list[Note]:
    """A note if runs count as converged although their last gain is below ε by less than its error."""
    frame = table.frame
    if not {"gain", "gain_se", EPSILON} <= set(frame):
        return []
    gain, se, epsilon = (pd.to_numeric(frame[name], errors="coerce") for name in ("gain", "gain_se", EPSILON))
    unsure = converged & (gain + SURE * se >= epsilon)
    if not unsure.any():
        return []
    run = frame.index[unsure][0]
    example = f"{frame.loc[run, table.roles['run']]}: {100 * gain[run]:.2g} ± {100 * se[run]:.1g} %"
    text = (
        f"{int(unsure.sum())} run(s) gained less than ε over their last doubling by less than the error, e.g. {example}"
    )
    return [note("convergence_unsure", "info", text)]


def _population(table: RunTable, law: Law) -> list[Note]:
    """Notes on differences that the runs of one law should not have: settings, k, tokens."""
    frame = table.frame
    fitted = {table.roles[role] for role in law.inputs if table.has(role)}
    names = [name for name in dict.fromkeys([*POPULATION, *_experts(table)]) if name in frame and name not in fitted]
    if "experts" in law.inputs:
        names = [name for name in names if name != "sae"]  # one expert is TopK
    along_tokens = bool(fitted & table.spent)
    if table.has("k") and table.roles["k"] not in fitted and not along_tokens:
        names.append(table.roles["k"])
    different = [name for name in names if frame[name].astype(str).nunique() > 1]
    notes = []
    if different:
        shown = "; ".join(f"{name}: {', '.join(sorted(frame[name].astype(str).unique())[:4])}" for name in different)
        notes.append(note("mixed_population", "warning", f"the runs differ in more than their size ({shown})"))
    if table.has("d") and not along_tokens and not _all_converged(table) and len(frame):
        tokens = table.use("d").values("d")
        if len(tokens) and tokens.max() > SAME_TOKENS * tokens.min():
            text = f"{table.roles['d']} range from {tokens.min():.4g} to {tokens.max():.4g}: no law at fixed tokens"
            notes.append(note("mixed_population", "warning", text))
    return notes


def _experts(table: RunTable) -> list[str]:
    """The column of the experts, which is no seed: runs that differ in it are not repeats of a cell."""
    return [table.roles["experts"]] if table.has("experts") and "experts" not in table.guessed else []


def _all_converged(table: RunTable) -> bool:
    return table.has("converged") and bool(table.column("converged").eq(True).all())
