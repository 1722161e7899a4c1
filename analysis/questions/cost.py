"""What a run like those of a table costs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from analysis.runs.table import RunTable
from harness.errors import UserError

Cost = Callable[[float, float], float]
"""(n, k) → training FLOPs of one run."""


def cost_of(table: RunTable) -> Cost:
    """FLOPs of a run like those of the table: by `harness.budget` if its settings are recorded, else by a fit.

    Tokens per run are the median of the table. Raises `UserError` if the table has neither settings nor FLOPs.
    """
    table = table.use("n", "k", "flops")
    frame = table.frame
    if {"d_model", "train.batch_tokens", "tokens"} <= set(frame) and frame["d_model"].notna().all():
        from harness.budget import flops_per_token
        from harness.config import SaeConfig

        d_model, batch = int(frame["d_model"].median()), int(frame["train.batch_tokens"].median())
        tokens = float(frame["tokens"].median())

        def exact(n: float, k: float) -> float:
            sae = SaeConfig(architecture="topk", n_latents=round(n), k=round(k))
            return tokens * sum(flops_per_token(sae, d_model, batch).values())

        return exact
    if not table.has("flops"):
        raise UserError(f"{table.name}: costs are unknown; name the column of training FLOPs with --flops")
    design = np.stack([np.ones(len(table)), np.log(table.values("n")), np.log(table.values("k"))], axis=1)
    c = np.linalg.lstsq(design, np.log(table.values("flops")), rcond=None)[0]
    return lambda n, k: float(np.exp(c[0] + c[1] * np.log(n) + c[2] * np.log(k)))
