"""Numbers that the papers print, or that were read off their figures: of other models and other data than ours.

Sources: Gao et al. 2024 (arXiv 2406.04093), text; Mudide et al. 2024 (arXiv 2410.08201), the tables of their
experiments, and for `SWITCH_SCALING` their figure 1, read to about 2 %.
"""

from __future__ import annotations

GAO_LAW = {"alpha": -0.50, "beta_k": 0.26, "beta_n": -0.017, "gamma": -0.042, "zeta": -1.32, "eta": -0.085}
"""L(n, k) of GPT-4, n from 2^11 on."""
GAO_CONVERGENCE = 0.6
"""Exponent of the tokens to convergence in n, GPT-2 small."""
GAO_RATE = -0.5
"""Exponent of the largest stable learning rate in n."""

SWITCH_K = (8, 16, 32, 64, 128, 192)
SWITCH_MSE = {
    "TopK": (2220, 1562, 1143, 889, 661, 522),
    "2 experts": (2126, 1456, 1031, 806, 606, 486),
    "4 experts": (2074, 1379, 960, 751, 561, 462),
    "8 experts": (2038, 1320, 904, 706, 536, 425),
    "16 experts": (2254, 1675, 1297, 1027, 760, 589),
    "32 experts": (2245, 1715, 1364, 1100, 805, 616),
    "64 experts": (2263, 1794, 1472, 1192, 893, 727),
    "128 experts": (2296, 1906, 1594, 1331, 1106, 1016),
}
"""MSE at `SWITCH_K` on GPT-2 small: 2 to 8 experts at the FLOPs of the TopK SAE, 16 to 128 at its width."""
SWITCH_FLOP_MATCHED = ("TopK", "2 experts", "4 experts", "8 experts")
SWITCH_WIDTH_MATCHED = ("TopK", "16 experts", "32 experts", "64 experts", "128 experts")
SWITCH_WIDTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
SWITCH_SCALING = {
    "TopK": (1880, 1590, 1375, 1203, 1069, 962, 880),
    "8 experts": (2350, 1917, 1587, 1323, 1162, 1010, 925),
    "64 experts": (3200, 2535, 2010, 1640, 1335, 1135, 1004),
}
"""MSE at k = 32 and `SWITCH_WIDTHS` latents in all."""
SWITCH_BALANCE = {0.0: 1137.0, 0.3: 1050.0, 1.0: 1039.0, 3.0: 1039.0, 100.0: 1046.0}
"""Weight of the balance term → MSE, 16 experts, k = 64."""
