"""The rule that brings raw activations to the scale an SAE works in, and back. It is stored with the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from harness.activations.statistics import layernorm_rows
from harness.ops.untyped import norm


class TokenUnits(NamedTuple):
    """What per-token normalisation took from each raw row."""

    mean: Float[Tensor, " tokens"]
    """Mean over d."""
    norm: Float[Tensor, " tokens"]
    """Norm of the row minus its mean; 0 for a constant row."""


@dataclass(frozen=True)
class Normalizer:
    rule: str
    """`scale`, `layernorm` or `none`, see `SaeConfig.normalize`."""
    scale: float
    """`scale`: the constant that rows are divided by; otherwise 1."""

    @property
    def per_token(self) -> bool:
        """Whether each row is normalised by its own mean and norm (`layernorm`), not by a constant."""
        return self.rule == "layernorm"

    def __call__(self, x: Float[Tensor, "tokens d"], dtype: torch.dtype) -> Float[Tensor, "tokens d"]:
        """Raw rows to normalised rows, in `dtype`."""
        x = x.to(dtype)
        if self.rule == "scale":
            return x / self.scale
        return layernorm_rows(x) if self.per_token else x

    def units(self, x: Float[Tensor, "tokens d"]) -> TokenUnits | None:
        """What `undo` needs to know of the raw rows `x`: nothing (None) unless the rule is per token."""
        if not self.per_token:
            return None
        mean = x.mean(dim=1)
        return TokenUnits(mean, norm(x - mean[:, None], dim=1))

    def undo(self, x: Float[Tensor, "tokens d"], units: TokenUnits | None) -> Float[Tensor, "tokens d"]:
        """Normalised rows to the model's own units; `units` as `units()` gave them for the same tokens."""
        if units is None:
            return x * self.scale
        return x * units.norm[:, None] + units.mean[:, None]

    def squared_unit(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, " tokens"]:
        """Per raw row, the factor from a squared error of normalised rows to one in the model's own units."""
        if self.per_token:
            x = x.float()
            return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=1)
        return torch.full((x.shape[0],), self.scale**2, device=x.device)


def make_normalizer(rule: str, d_model: int, mean_sq_norm: float) -> Normalizer:
    """`mean_sq_norm` is E‖x‖² of the raw training rows; the rule `scale` brings it to d_model."""
    return Normalizer(rule, math.sqrt(mean_sq_norm / d_model) if rule == "scale" else 1.0)
