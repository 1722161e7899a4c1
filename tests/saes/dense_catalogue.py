"""An independent judge of the catalogue: each architecture as dense float64 autograd, from the papers' formulas.

It shares no code with the harness. Derivatives that are conventions, those of the jump, are autograd functions here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.saes.dense import top_mask


class Jump(torch.autograd.Function):
    """a·H(a − θ) with the straight-through derivative in θ, and in a too if `through`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, theta: Tensor, epsilon: float, through: bool) -> Tensor:
        ctx.save_for_backward(a, theta)
        ctx.epsilon, ctx.through = epsilon, through
        return a * (a > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, theta = ctx.saved_tensors
        kernel = ((a - theta).abs() < ctx.epsilon / 2).to(a.dtype) * theta / ctx.epsilon
        to_a = grad * ((a > theta) + (kernel if ctx.through else 0.0))
        return to_a, -(kernel * grad).sum(dim=0), None, None


class Heaviside(torch.autograd.Function):
    """H(a − θ) with derivative −K/ε in θ and none in a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, theta: Tensor, epsilon: float) -> Tensor:
        ctx.save_for_backward(a, theta)
        ctx.epsilon = epsilon
        return (a > theta).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, theta = ctx.saved_tensors
        kernel = ((a - theta).abs() < ctx.epsilon / 2).to(a.dtype) / ctx.epsilon
        return None, -(kernel * grad).sum(dim=0), None


class ProLu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, m: Tensor, b: Tensor, rule: str) -> Tensor:
        gate = (m > 0) & (m + b > 0)
        ctx.save_for_backward(m, gate)
        ctx.rule = rule
        return m * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        m, gate = ctx.saved_tensors
        dm, db = (1.0, 1.0) if ctx.rule == "relu" else (1 + m, m)
        return grad * gate * dm, (grad * gate * db).sum(dim=0), None


def batch_mask(a: Tensor, count: int) -> Tensor:
    """1 at the `count` largest positive values of the whole matrix, equal ones by row, then column."""
    flat = a.relu().flatten()
    order = torch.argsort(-flat, stable=True)
    mask = torch.zeros_like(flat)
    mask[order[:count]] = 1.0
    return (mask * (flat > 0)).view(a.shape)


def catalogue_loss(
    params: dict[str, Tensor],
    x: Tensor,
    *,
    architecture: str,
    k: int,
    variance: float,
    sparsity: float,
    aux_alpha: float = 0.0,
    aux_k: int = 0,
    dead: Tensor | None = None,
    prefixes: tuple[int, ...] = (),
    bandwidth: float = 0.1,
    preactivation_penalty: float = 0.0,
    prolu: str = "ste",
) -> dict[str, Tensor]:
    """Loss, its parts and the active latents z of the headline reconstruction."""
    W_enc, W_dec, b_dec = params["W_enc"], params["W_dec"], params["b_dec"]
    b_enc = params.get("b_enc", torch.zeros(W_enc.shape[0], dtype=x.dtype))
    tokens, free = x.shape[0], architecture in ("relu_decoder_norm", "jumprelu_tanh", "topk_decoder_norm")
    products = (x if free else x - b_dec) @ W_enc.T
    a = products + b_enc

    def error(z: Tensor, decoder: Tensor = W_dec, bias: Tensor = b_dec) -> Tensor:
        return (x - z @ decoder - bias).square().sum() / (tokens * variance)

    penalty, extra = x.new_zeros(()), x.new_zeros(())
    if architecture == "multi_topk":
        z = a.relu() * top_mask(a.detach(), k)
        extra = error(a.relu() * top_mask(a.detach(), 4 * k)) / 8
        main = error(z)
    elif architecture in ("batchtopk", "matryoshka"):
        z = a * batch_mask(a.detach(), k * tokens)
        main = error(z)
        if architecture == "matryoshka":
            errors = [error(z * (torch.arange(a.shape[1]) < end)) for end in prefixes]
            extra = torch.stack(errors).mean() - main
    elif architecture == "topk_decoder_norm":
        z = a.relu() * top_mask((a * W_dec.norm(dim=1)).detach(), k)
        main = error(z)
    elif architecture == "relu":
        z = a.relu()
        main, penalty = error(z), sparsity * z.sum() / tokens
    elif architecture == "relu_decoder_norm":
        z = a.relu()
        main, penalty = error(z), sparsity * (z * W_dec.norm(dim=1)).sum() / tokens
    elif architecture == "prolu":
        z = ProLu.apply(products, b_enc, prolu)
        main, penalty = error(z), sparsity * z.sum() / tokens
    elif architecture == "gated":
        z = (a > 0) * (params["r_mag"].exp() * products + params["b_mag"]).relu()
        main, penalty = error(z), sparsity * a.relu().sum() / tokens
        extra = error(a.relu(), W_dec.detach(), b_dec.detach())
    elif architecture == "jumprelu":
        theta = params["log_threshold"].exp()
        z = Jump.apply(a, theta, bandwidth, False)
        main = error(z)
        penalty = sparsity * Heaviside.apply(a, theta, bandwidth).sum() / tokens
    elif architecture == "jumprelu_tanh":
        theta, norms = params["log_threshold"].exp(), W_dec.norm(dim=1)
        z = Jump.apply(a, theta, bandwidth, True)
        main = error(z)
        penalty = sparsity * torch.tanh(4 * z * norms).sum() / tokens
        penalty = penalty + preactivation_penalty * ((theta - a).relu() * norms).sum() / tokens
    else:
        z = a.relu() * top_mask(a.detach(), k)
        main = error(z)
    aux = x.new_zeros(())
    if dead is not None and bool(dead.any()) and aux_alpha:
        e = (x - z @ W_dec - b_dec).detach()
        hidden = a.detach().masked_fill(~dead, -torch.inf)
        chosen = top_mask(hidden, min(aux_k, int(dead.sum()))) * dead
        spread = (e - e.mean(dim=0)).square().sum()
        aux = ((a.relu() * chosen) @ W_dec - e).square().sum() / spread if float(spread) > 0 else aux
    return {"loss": main + extra + penalty + aux_alpha * aux, "fvu": main, "aux_loss": aux, "z": z}
