"""Pictures as functions on `Axes`: each draws into the axes it is given and returns them.

No global settings are touched and nothing is shown.
"""

from analysis.plot.compute import isoflop_minima, isoflop_profiles, loss_against_flops
from analysis.plot.law import loss_against_n, profile, residuals_against_n
from analysis.plot.runs import architectures, best_learning_rates, dead_latents, tokens_to_convergence
from analysis.plot.style import figure, show

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
