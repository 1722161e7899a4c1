"""Which expert sees which token: routing and the router's gradient (Mudide et al. 2024, §3), and controls of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import Groups
from harness.parallel import Shards
from harness.saes.sae import Params, Sae

_HASHED = 32
"""Coordinates of a row that decide its random expert; two rows that agree in all of them are equal in practice."""
_MIX = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)
"""Odd multipliers of the random draw, below 2⁶³."""


@dataclass(frozen=True)
class Routing:
    """The tokens of this rank's experts, sorted by expert. For one expert: all tokens, in place, unscaled."""

    groups: Groups
    order: Int[Tensor, " own"] | None = None
    """Row in the batch of each own token; None: all, as they are."""
    scale: Float[Tensor, " own"] | None = None
    """p of the chosen expert, the factor on the reconstruction; None without a learned router."""
    probabilities: Float[Tensor, "own experts"] | None = None
    counts: Int[Tensor, " experts"] | None = None
    """Tokens of this replica's batch that each expert receives."""


def router_probabilities(params: Params, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens experts"]:
    """softmax(W_r(x − b_r)), in the parameters' own precision."""
    # a separate product with b_r saves a copy of the whole batch
    weight = params["W_r"]
    return torch.softmax(x.to(weight.dtype) @ weight.T - weight @ params["b_r"], dim=1)


def drawn(x: Float[Tensor, "tokens d"], number: int) -> Int[Tensor, " tokens"]:
    """A random number from 0 to 2³⁰ − 1 per row: a function of the row and of `number`, on any mesh."""
    bits = x[:, :_HASHED].float().view(torch.int32).long()
    place = torch.arange(1, bits.shape[1] + 1, device=x.device)
    # integers that wrap: the sum does not depend on its order
    mixed = (bits * (place * _MIX[0] | 1)).sum(dim=1) + number * _MIX[1] % (1 << 63)
    for factor in _MIX[1:]:
        mixed = (mixed ^ (mixed >> 31)) * factor
    return (mixed >> 33) & ((1 << 30) - 1)


def chosen_expert(
    sae: Sae, params: Params, x: Float[Tensor, "tokens d"], number: int = 0
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, "tokens experts"] | None]:
    """The expert of each token, and the probabilities of a router that learns: it takes the most probable expert (the
    lowest of equal ones). `number` distinguishes random draws; 0 for finished SAEs."""
    if sae.routing == "random":
        return drawn(x, number) % sae.n_experts, None
    probabilities = router_probabilities(params, x)
    return probabilities.argmax(dim=1), probabilities if sae.learns_routing else None


def route(
    sae: Sae, params: Params, x: Float[Tensor, "tokens d"], shards: Shards, number: int = 0, pairs: bool = False
) -> Routing:
    """Send each token to its expert, without noise or capacity. With `pairs` the second half of `x` repeats the first,
    and each of its rows goes to another expert than the first time, drawn from all others."""
    rows = shards.rows(sae.n_latents)
    if not sae.routed:
        # made on the device: a copy from the host would wait for it
        whole = torch.arange(2, device=x.device) * x.shape[0]
        return Routing(Groups(whole, (0, rows.stop - rows.start)))
    expert, probabilities = chosen_expert(sae, params, x, number)
    if pairs:
        first = expert[: x.shape[0] // 2]
        # a draw of its own, whatever `number` the other one has
        further = 1 + drawn(x[: x.shape[0] // 2], -1 - number) % (sae.n_experts - 1)
        expert = torch.cat([first, (first + further) % sae.n_experts])
    expert, order = expert.sort(stable=True)
    # bincount would wait for the device
    offsets = torch.searchsorted(expert, torch.arange(sae.n_experts + 1, device=expert.device))
    counts = offsets.diff()
    own = shards.rows(sae.n_experts)
    offsets = offsets[own.start : own.stop + 1]
    if shards.shard > 1:
        first, last = int(offsets[0]), int(offsets[-1])
        order, expert, offsets = order[first:last], expert[first:last], offsets - first
    width = sae.latents_per_expert
    groups = Groups(offsets, tuple(width * e for e in range(own.stop - own.start + 1)))
    if probabilities is None:
        return Routing(groups, order, counts=counts)
    probabilities = probabilities[order]
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
