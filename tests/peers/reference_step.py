"""What the written-down peers share: the loss, Adam, the projection and the unit norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness.bench.peer_worker import Step, adam

Gradients = Callable[[], dict[str, Tensor]]


def variance(x: Tensor) -> float:
    """Mean over tokens of ‖x − mean x‖²: the unit of fvu."""
    return float((x - x.mean(dim=0)).square().sum(dim=1).mean())


def fvu(x: Tensor, reconstruction: Tensor, unit: float) -> Tensor:
    """Mean over tokens of ‖x − x̂‖², in units of `unit`."""
    return (x - reconstruction.to(x.dtype)).square().sum(dim=1).mean() / unit


def steps(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], decoders: Sequence[Tensor], steel: bool
) -> tuple[Step, Step]:
    """Forward and backward alone, and a whole step. The rows of `decoders`, among `parameters`, have unit norm."""
    optimizer = adam(parameters, steel)

    def gradients() -> None:
        optimizer.zero_grad()
        loss().backward()

    def whole() -> None:
        gradients()
        with torch.no_grad():
            for weight in decoders:
                if weight.grad is not None:
                    weight.grad -= (weight.grad * weight).sum(dim=1, keepdim=True) * weight
            optimizer.step()
            for weight in decoders:
                weight /= weight.norm(dim=1, keepdim=True)

    return gradients, whole
