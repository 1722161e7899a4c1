"""The rule that brings raw activations to the scale an SAE works in; it is stored with the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Normalizer:
    rule: str
    """`scale`, `layernorm` or `none`, see `SaeConfig.normalize`."""
    scale: float
    """`scale`: the constant that rows are divided by; otherwise 1."""

    def __call__(self, x: Float[Tensor, "tokens d"], dtype: torch.dtype) -> Float[Tensor, "tokens d"]:
        """Raw rows to normalised ones, in `dtype`."""
        x = x.to(dtype)
        if self.rule == "scale":
            return x / self.scale
        if self.rule == "layernorm":
            centred = x - x.mean(dim=1, keepdim=True)
            return centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        return x

    def squared_unit(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, " tokens"]:
        """Per raw row, the factor that takes a squared error back to the model's own units."""
        if self.rule == "layernorm":
            x = x.float()
            return (x - x.mean(dim=1, keepdim=True)).square().sum(dim=1)
        return torch.full((x.shape[0],), self.scale**2, device=x.device)


def make_normalizer(rule: str, d_model: int, mean_sq_norm: float) -> Normalizer:
    """`mean_sq_norm` is E‖x‖² of the raw training rows; `scale` brings it to d_model."""
    return Normalizer(rule, math.sqrt(mean_sq_norm / d_model) if rule == "scale" else 1.0)
