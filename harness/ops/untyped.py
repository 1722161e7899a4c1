"""Functions of torch whose own annotations leave types open, with their types."""

# The annotations of torch are incomplete here, so each call below is unknown to the type checker.
from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def norm(x: Float[Tensor, ...], dim: int | None = None, keepdim: bool = False) -> Float[Tensor, ...]:
    """Euclidean norm over `dim`, or of all numbers together."""
    return x.norm(dim=dim, keepdim=keepdim)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def entr(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−p·ln p, 0 where p is 0."""
    return torch.special.entr(p)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def integers(tensor: Int[Tensor, " count"]) -> list[int]:
    """The numbers on the host. Waits for the device."""
    return tensor.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def relu_backward_(gradient: Float[Tensor, "*shape"], activation: Float[Tensor, "*shape"]) -> None:
    """Sets `gradient` to 0 where `activation` is not above 0, in one pass over memory."""
    torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0, grad_input=gradient)  # pyright: ignore[reportUnknownMemberType]
