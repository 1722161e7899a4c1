"""`make reproduce`: the studies of a paper one after another, then its figures and the table of claims."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness.errors import INTERRUPTED, UserError
from harness.terminal import python_command, say

SCALES = ("cores", "paper")

STUDIES = {
    ("gao2024", "cores"): (
        *("reproduce/gao2024_dead", "reproduce/gao2024_convergence", "reproduce/gao2024_learning_rate"),
        *("reproduce/gao2024_activations", "reproduce/quality"),
    ),
    ("gao2024", "paper"): ("gao2024_nk", "gao2024_baselines"),
    ("switch2024", "cores"): (
        *("reproduce/switch2024_orders", "reproduce/switch2024_router", "routing", "reproduce/quality"),
    ),
    ("switch2024", "paper"): ("switch2024_flop_matched", "switch2024_width_matched"),
}
"""(paper, scale) → its studies: at a size for two CPU cores, or at that of the paper, for a cluster."""


def studies_of(paper: str, scale: str) -> tuple[str, ...]:
    """The studies by name. Raises `UserError` for a paper or a scale that is not known."""
    if (paper, scale) not in STUDIES:
        known = ", ".join(sorted({name for name, _ in STUDIES}))
        raise UserError(f"nothing reproduces {paper} at SCALE={scale}; papers: {known}; scales: {', '.join(SCALES)}")
    return STUDIES[paper, scale]


def reproduce(paper: str, scale: str, out: Path, run: Callable[[str], int], trains_here: bool) -> int:
    """Run every study of a paper, then draw and judge what there is; the worst exit code of the studies.

    Args:
        run: Trains, evaluates and reports one study, and returns its exit code; done cells cost nothing.
        trains_here: False if `run` submits jobs or only shows the plan: then the figures are left to a later command.
    """
    worst = 0
    for study in studies_of(paper, scale):
        say(f"== {study}")
        code = run(study)
        if code == INTERRUPTED:
            return code
        worst = max(worst, code)
    folder = out / "reproduction" / paper
    sweeps = [out / Path(study).name for study in studies_of(paper, scale)]
    if not trains_here:
        say(f"when the runs have ended: {python_command('analysis', 'figures', paper, *sweeps, '--out', folder)}")
        return worst
    from analysis.cli import main as analysis

    present = [str(sweep) for sweep in sweeps if any(sweep.glob("*/"))]
    return max(worst, analysis(["figures", paper, *present, "--out", str(folder)]))
