"""What can be wrong with data, a design or a fit: typed notes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

SEVERITIES = ("info", "warning", "error")

REMEDIES = {
    # design
    "too_few_points": "run more cells, or fit a law with fewer parameters",
    "too_few_levels": "add more values of that variable, or fit a law that does not use it",
    "confounded_n_flops": "vary tokens at fixed n; until then n and FLOPs cannot be told apart",
    "single_seed": "repeat at least three cells with a second seed, so that noise can be separated from misfit",
    "degenerate_design": "widen the grid, or fit a nested form with fewer parameters",
    # data
    "nonfinite_loss": "look at the runs that were left out; they did not enter the fit",
    "nonpositive_loss": "a loss of zero or less has no logarithm; check its column and its units",
    "worse_than_mean": "such runs blew up: lower their learning rate, then train them again",
    "duplicate_run": "only the first was kept; check how the table was put together",
    "earlier_checkpoints": "only the last of each run was fitted; for a law of another step choose it with --where",
    "checkpoints": "name the column of the runs (--run COLUMN), so that only the last checkpoint of each is fitted",
    "unused_column": "name it on the command line if it has that role, e.g. --status COLUMN",
    "unknown_words": "use words such as done, finished, failed for the status, and yes and no for converged",
    "commented_rows": "remove the # if they are rows, or put the value in quotes",
    "unconverged_run": "train longer (train.until=convergence), or read the law as one at fixed tokens",
    "convergence_unsure": "evaluate on more rows (train.eval_rows), or train on to a smaller train.convergence_epsilon",
    "repeated_rows": "harvest more rows (activations.tokens), or read the law as one of repeated rows",
    "not_monotone": "look at the learning rates and dead latents of these sizes before reading the law",
    "mixed_dead_latents": "dead latents bend the law: lower the learning rate or strengthen AuxK where many die",
    "mixed_population": "fit one population at a time (--where COLUMN=VALUE)",
    "identical_repeats": "vary what makes repeats differ (train.seed, stream.seed); a copy is no repeat",
    # the record: what no residual can show
    "level_at_budget": "fit sae_nkd, which has a term for tokens, or train.until=convergence",
    "untuned_rates": "run at least two sizes at several rates (train.lr_factor=2,4,8); the best of each cell is fitted",
    "one_data_order": "repeat some cells with another stream.seed",
    # fit
    "floor_not_identified": "add larger n: the span covered does not separate the floor from the power law",
    "parameter_at_bound": "the data push this parameter to the edge of its range; fit the nested form without it",
    "start_equals_solution": "the optimiser did not move: the estimate is a guess, not a fit; allow more evaluations",
    "optimum_not_reproduced": "raise the number of starts: too few reached the best optimum",
    # quality
    "large_residuals": "the law does not describe these runs: look for a second variable or another form",
    "one_cell_decides": "repeat that cell, or add cells beyond it, before reading the exponents",
    "edge_rows": "look at these runs (learning rate, dead latents, tokens), or fit without them (--where)",
    "structured_residuals": "the residuals have a pattern: the form is wrong, or the runs are not comparable",
    "lack_of_fit": "residuals exceed the noise between seeds: try another form or look for a second variable",
    "outlier_driven": "check the named runs; fit with robust='huber' and compare",
    "extrapolation": "run cells nearer to the target before relying on this number",
    "isoflop_edge": "add sizes beyond the edge, so that the minimum is bracketed",
    "isoflop_nonconvex": "repeat the noisy cells of that budget",
    "frontier_owned_by_end": "train the smaller runs longer, or the larger ones to more tokens",
}
"""Every code, and what to do about it."""


@dataclass(frozen=True)
class Note:
    """One finding: `code` is for programs, `message` says what is wrong, `remedy` what to do about it."""

    code: str
    severity: str
    message: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.code in REMEDIES, f"unknown note code {self.code}"
        assert self.severity in SEVERITIES, f"unknown severity {self.severity}"
        if not self.remedy:
            object.__setattr__(self, "remedy", REMEDIES[self.code])

    def as_dict(self) -> dict[str, str]:
        """code, severity, message, remedy."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.severity}: {self.code}: {self.message} — {self.remedy}"


def note(code: str, severity: str, message: str, remedy: str = "") -> Note:
    """A note; its remedy is the standard one of its code if none is given."""
    return Note(code, severity, message, remedy)


def has(notes: Iterable[Note], code: str) -> bool:
    """Whether a note with that code is among `notes`."""
    return any(entry.code == code for entry in notes)


def any_error(notes: Iterable[Note]) -> bool:
    """Whether a note of severity error is among `notes`."""
    return any(entry.severity == "error" for entry in notes)


def by_severity(notes: Iterable[Note]) -> list[Note]:
    """The notes with the most severe first, each once; otherwise in their order."""
    return sorted(dict.fromkeys(notes), key=lambda entry: -SEVERITIES.index(entry.severity))
