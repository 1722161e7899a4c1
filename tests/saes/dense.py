"""An independent judge: TopK and Switch SAEs as dense float64 autograd, written from the papers' formulas.

It shares no code with the harness: every latent of every expert is computed, masked, and differentiated by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_mask(preactivations: Tensor, k: int) -> Tensor:
    """1 at the k largest of each row, equal values to the lowest index, 0 elsewhere."""
    order = torch.argsort(-preactivations, dim=1, stable=True)
    return torch.zeros_like(preactivations).scatter_(1, order[:, :k], 1.0)


def dense_loss(
    params: dict[str, Tensor],
    x: Tensor,
    *,
    k: int,
    n_experts: int,
    variance: float,
    aux_alpha: float = 0.0,
    aux_k: int = 0,
    dead: Tensor | None = None,
    balance_weight: float = 0.0,
    experts: Tensor | None = None,
) -> dict[str, Tensor]:
    """Loss and its parts; `dead` is a boolean per latent. Without `W_r` in `params` it is a TopK SAE.

    `experts`: of each token, without a router.
    """
    n = params["W_enc"].shape[0]
    bias = params.get("b_enc", torch.zeros(n, dtype=x.dtype))
    preactivations = (x - params["b_dec"]) @ params["W_enc"].T + bias
    probability = torch.ones(x.shape[0], dtype=x.dtype)
    own = torch.ones_like(preactivations)
    balance = x.new_ones(())
    if experts is not None:
        own = torch.nn.functional.one_hot(experts, n_experts).to(x.dtype).repeat_interleave(n // n_experts, dim=1)
    elif "W_r" in params:
        p = torch.softmax((x - params["b_r"]) @ params["W_r"].T, dim=1)
        expert = p.argmax(dim=1)
        probability = p.gather(1, expert[:, None]).squeeze(1)
        own = torch.nn.functional.one_hot(expert, n_experts).to(x.dtype).repeat_interleave(n // n_experts, dim=1)
        share = torch.nn.functional.one_hot(expert, n_experts).to(x.dtype).mean(dim=0)
        balance = n_experts * (share * p.mean(dim=0)).sum()

    def latents(allowed: Tensor, per_token: Tensor) -> Tensor:
        """ReLU of the `per_token` largest pre-activations among the allowed latents of each token."""
        hidden = preactivations.detach().masked_fill(allowed == 0, -torch.inf)
        order = torch.argsort(-hidden, dim=1, stable=True)
        rank = torch.argsort(order, dim=1)
        mask = (rank < per_token[:, None]) & (allowed > 0)
        return torch.relu(preactivations) * mask

    z = latents(own, torch.full((x.shape[0],), k))
    reconstruction = probability[:, None] * (z @ params["W_dec"]) + params["b_dec"]
    fvu = (x - reconstruction).square().sum(dim=1).mean() / variance
    aux = x.new_zeros(())
    if dead is not None and bool(dead.any()) and aux_alpha:
        e = (x - reconstruction).detach()
        allowed = own * dead.to(x.dtype)
        count = torch.clamp(allowed.sum(dim=1).long(), max=aux_k)
        estimate = probability.detach()[:, None] * (latents(allowed, count) @ params["W_dec"])
        spread = (e - e.mean(dim=0)).square().sum()
        aux = (estimate - e).square().sum() / spread if float(spread) > 0 else aux
    loss = fvu + aux_alpha * aux + (balance_weight * balance if "W_r" in params else 0.0)
    return {"reconstruction": reconstruction, "loss": loss, "fvu": fvu, "aux_loss": aux, "balance": balance, "z": z}
