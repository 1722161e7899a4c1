"""Turns records of runs into scaling laws: point estimates, intervals, comparisons, pictures, a report.

    from analysis import load, fit
    result = fit(load("runs/quick"), "sae_nk")

The analysis imports no torch. It imports matplotlib and jinja2 only to draw a picture or to write a report.
"""

from typing import TYPE_CHECKING, Any

from analysis.fits.compare import compare
from analysis.fits.fit import fit
from analysis.fits.result import FitResult
from analysis.fits.status import Status
from analysis.laws.catalogue import LAWS
from analysis.notes import Note
from analysis.questions.frontier import frontier
from analysis.questions.isoflop import isoflop
from analysis.runs.load import load
from analysis.runs.table import RunTable

if TYPE_CHECKING:
    from analysis.report import plot

__all__ = ["LAWS", "FitResult", "Note", "RunTable", "Status", "compare", "fit", "frontier", "isoflop", "load", "plot"]


def __getattr__(name: str) -> Any:
    """`analysis.plot`, which needs matplotlib, is imported when it is first used."""
    if name == "plot":
        from analysis.report import plot

        return plot
    raise AttributeError(f"module 'analysis' has no attribute {name!r}")
