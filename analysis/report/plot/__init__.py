"""Pictures as functions on `Axes`: each draws into the given axes and returns them.

They change no global settings and open no window.
"""

from analysis.report.plot.compute import isoflop_minima, isoflop_profiles, loss_against_flops
from analysis.report.plot.law import loss_against_n, profile, residuals_against_n
from analysis.report.plot.runs import architectures, best_learning_rates, dead_latents, tokens_to_convergence
from analysis.report.plot.style import figure, show

__all__ = [
    "architectures",
    "best_learning_rates",
    "dead_latents",
    "figure",
    "isoflop_minima",
    "isoflop_profiles",
    "loss_against_flops",
    "loss_against_n",
    "profile",
    "residuals_against_n",
    "show",
    "tokens_to_convergence",
]
