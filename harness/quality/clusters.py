"""Means and ratios with standard errors that are clustered by document: tokens of one document are not independent."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from harness.record.quality import Value


def by_document(
    values: Float[Tensor, " rows"], cluster: Int[Tensor, " rows"], documents: int
) -> Float64[Tensor, " documents"]:
    """Sum of `values` over the rows of each document; `cluster` numbers the documents from 0."""
    return torch.zeros(documents, dtype=torch.float64).index_add_(0, cluster.cpu(), values.double().cpu())


def ratio(numerator: Float64[Tensor, " documents"], denominator: Float64[Tensor, " documents"]) -> Value:
    """Σ numerator / Σ denominator. The standard error is that of the linearised residual per document; None for a
    single document."""
    below = float(denominator.sum())
    if below == 0:
        return Value(math.nan)
    value = float(numerator.sum()) / below
    count = len(numerator)
    if count < 2:
        return Value(value)
    residual = numerator - value * denominator
    return Value(value, math.sqrt(count / (count - 1) * float(residual.square().sum())) / abs(below))


def mean(values: Float[Tensor, " items"]) -> Value:
    """The mean of independent numbers, such as one per latent. NaN without any."""
    count = len(values)
    if count == 0:
        return Value(math.nan)
    spread = float(values.double().std()) / math.sqrt(count) if count > 1 else None
    return Value(float(values.double().mean()), spread)
