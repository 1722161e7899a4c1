"""Which expert sees which token: routing and the router's gradient (Mudide et al. 2024, §3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import Groups
from harness.parallel import Shards
from harness.saes.sae import Params, Sae


@dataclass(frozen=True)
class Routing:
    """The tokens of this rank's experts, sorted by expert. For one expert: all tokens, in place, unscaled."""

    groups: Groups
    order: Int[Tensor, " own"] | None = None
    """Row in the batch of each own token; None: all, as they are."""
    scale: Float[Tensor, " own"] | None = None
    """p of the chosen expert, the factor on the reconstruction."""
    probabilities: Float[Tensor, "own experts"] | None = None
    counts: Int[Tensor, " experts"] | None = None
    """Tokens of this replica's batch that each expert receives."""

    def centred(self, rows: Float[Tensor, "tokens d"], offset: Float[Tensor, " d"]) -> Float[Tensor, "own d"]:
        """The own rows minus `offset`, as a new tensor."""
        return rows - offset if self.order is None else rows[self.order].sub_(offset)


def router_probabilities(params: Params, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens experts"]:
    """softmax(W_r(x − b_r)), in the parameters' own precision."""
    # a separate product with b_r saves a copy of the whole batch
    weight = params["W_r"]
    return torch.softmax(x.to(weight.dtype) @ weight.T - weight @ params["b_r"], dim=1)


def route(sae: Sae, params: Params, x: Float[Tensor, "tokens d"], shards: Shards) -> Routing:
    """Send each token to its most probable expert (the lowest of equal ones), without noise or capacity."""
    rows = shards.rows(sae.n_latents)
    if not sae.routed:
        # made on the device: a copy from the host would wait for it
        whole = torch.arange(2, device=x.device) * x.shape[0]
        return Routing(Groups(whole, (0, rows.stop - rows.start)))
    probabilities = router_probabilities(params, x)
    expert = probabilities.argmax(dim=1)
    # bincount would wait for the device
    counts = expert.new_zeros(sae.n_experts).scatter_add_(0, expert, torch.ones_like(expert))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    order = expert.argsort(stable=True)
    own = shards.rows(sae.n_experts)
    offsets = offsets[own.start : own.stop + 1]
    if shards.shard > 1:
        first, last = int(offsets[0]), int(offsets[-1])
        order, offsets = order[first:last], offsets - first
    width = sae.latents_per_expert
    groups = Groups(offsets, tuple(width * e for e in range(own.stop - own.start + 1)))
    probabilities, expert = probabilities[order], expert[order]
    scale = probabilities.gather(1, expert[:, None]).squeeze(1)
    return Routing(groups, order, scale, probabilities, counts)


def router_grads(
    sae: Sae,
    params: Params,
    centred: Float[Tensor, "own d"],
    routing: Routing,
    share: Float[Tensor, " experts"],
    scale_grad: Float[Tensor, " own"],
    global_tokens: int,
    grads: Params,
) -> None:
    """Write dL/dW_r and dL/db_r of the own tokens: from the reconstruction through p (`scale_grad` = dL/dp of the
    chosen expert), and from the balance term λ·E·Σ f_i·P_i with P_i the mean probability of expert i and f_i its
    `share` of the global batch, which has no gradient. `centred` = x − b_dec."""
    p = routing.probabilities
    assert p is not None and routing.scale is not None
    balance = share * (sae.balance_weight * sae.n_experts / global_tokens)
    # softmax backward of g = balance + scale_grad at the chosen expert, without building g
    chosen = p.argmax(dim=1, keepdim=True)
    inner = p @ balance + scale_grad * routing.scale
    logit_grad = p * (balance - inner[:, None])
    logit_grad.scatter_add_(1, chosen, (scale_grad * routing.scale)[:, None])
    total = logit_grad.sum(dim=0)
    grads["W_r"].copy_(logit_grad.T @ centred.to(logit_grad.dtype))
    # the logits are of x − b_r
    grads["W_r"].addr_(total, params["b_dec"] - params["b_r"])
    grads["b_r"].copy_(-(total @ params["W_r"]))
