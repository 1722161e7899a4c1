"""Turns records of runs into scaling laws: point estimates, intervals, comparisons, pictures, a report.

    from analysis import load, fit
    result = fit(load("runs/quick"), "sae_nk")

No module of it imports torch; matplotlib and jinja2 are imported when a picture or a report is asked for.
"""

from analysis.compare import compare
from analysis.fit import fit
from analysis.frontier import frontier
from analysis.isoflop import isoflop
from analysis.laws import LAWS
from analysis.load import load
from analysis.notes import Note
from analysis.result import FitResult, Status
from analysis.table import RunTable

__all__ = ["LAWS", "FitResult", "Note", "RunTable", "Status", "compare", "fit", "frontier", "isoflop", "load"]
