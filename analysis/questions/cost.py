"""What a run like those of a table costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.fits.result import FitResult
from analysis.runs.table import RunTable
from harness.errors import UserError

if TYPE_CHECKING:
    from harness.config import SaeConfig

Cost = Callable[[float, float], float]
"""(n, k) → training FLOPs of one run; inf for sizes that no SAE of this kind can have."""


Kind = tuple[str, int]
"""Architecture and number of experts."""
TOPK: Kind = ("topk", 1)


def cost_of(table: RunTable) -> Cost:
    """FLOPs of a run like those of the table: by `harness.budget` if its settings are recorded, else by a fit.

    Tokens per run are the median of the table. Experts are at least as wide, per active latent, as the narrowest of the
    table. Raises `UserError` if the table has neither settings nor FLOPs, or runs of several kinds.
    """
    table = table.use("n", "k", "flops")
    frame = table.frame
    if {"d_model", "train.batch_tokens", "tokens"} <= set(frame) and frame["d_model"].notna().all():
        from harness.budget import flops_per_token

        d_model, batch = int(frame["d_model"].median()), int(frame["train.batch_tokens"].median())
        tokens = float(frame["tokens"].median())
        sae = _settings(table)
        experts = sae.n_experts
        narrowest = float((table.values("n") / table.values("k")).min()) if experts > 1 else 1.0

        def exact(n: float, k: float) -> float:
            if round(n) % experts or n < narrowest * k:
                return math.inf
            return tokens * sum(flops_per_token(replace(sae, n_latents=round(n), k=round(k)), d_model, batch).values())

        return exact
    if not table.has("flops"):
        raise UserError(f"{table.name}: costs are unknown; name the column of training FLOPs with --flops")
    design = np.stack([np.ones(len(table)), np.log(table.values("n")), np.log(table.values("k"))], axis=1)
    c = np.linalg.lstsq(design, np.log(table.values("flops")), rcond=None)[0]
    return lambda n, k: float(np.exp(c[0] + c[1] * np.log(n) + c[2] * np.log(k))) if n >= k else math.inf


def kind_of(table: RunTable) -> Kind:
    """What the runs of a table are; TopK if it does not say.

    Raises `UserError` if there are several.
    """
    kind = []
    for name, default in zip(("sae", table.roles.get("experts", "n_experts")), TOPK, strict=True):
        found = sorted(set(table.frame[name].dropna())) if name in table.frame else []
        if len(found) > 1:
            several = ", ".join(map(str, found))
            raise UserError(f"the cost of a run depends on {name}, and these have {several}; choose one with --where")
        kind.append(found[0] if found else default)
    return str(kind[0]), int(kind[1])


def fitted_runs(table: RunTable, result: FitResult) -> RunTable:
    """The runs of a table that entered a fit."""
    return table.keep(table.column("run").astype(str).isin(result.runs).to_numpy(), "not in the fit")


def _settings(table: RunTable) -> SaeConfig:
    """The settings that the runs share; n and k are placeholders."""
    from harness.config import SaeConfig

    architecture, experts = kind_of(table)
    shared = {}
    for entry in fields(SaeConfig):
        values = table.frame.get(f"sae.{entry.name}")
        if type(entry.default) in (bool, int, float) and values is not None and values.nunique(dropna=False) == 1:
            shared[entry.name] = type(entry.default)(values.iloc[0])
    return SaeConfig(**shared | {"architecture": architecture, "n_experts": experts, "n_latents": experts, "k": 1})
