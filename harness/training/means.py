"""What a step adds to the sums of which a log line tells the means."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.config import Config
from harness.saes import Stats
from harness.training import end_to_end

SUMS = ("loss", "fvu_train", "aux_loss", "balance", "l0", "router_entropy", "grad_norm", "n_dead")

PENALTY_SUMS = ("sparsity", "dense_share")
"""Further means of architectures with a penalty: λ, and the share of steps with dense products, since too many
latents were active for lists."""

MUTUAL_SUMS = ("mutual",)
"""Further mean of SAEs with peers: the penalty of `saes.mutual`, before its weight."""


def further_sums(config: Config) -> tuple[str, ...]:
    """The sums beyond `SUMS` and the experts' shares."""
    return (
        *(PENALTY_SUMS if config.sae.traits.penalty else ()),
        *(MUTUAL_SUMS if config.train.peers else ()),
        *(end_to_end.SUMS if config.train.objective in end_to_end.WEIGHTS else ()),
    )


def summed(
    config: Config,
    stats: Stats,
    norm: Float[Tensor, ""] | None,
    sparsity: Float[Tensor, ""] | None,
    n_dead: Int[Tensor, ""],
) -> Float[Tensor, " sums"]:
    """The values of one step: `SUMS`, the share of each expert, `further_sums`. `norm`: of the gradient, if it was
    needed; `sparsity`: the coefficient of the penalty, if there is one."""
    zero = stats.loss.new_zeros(())
    values = [stats.loss, stats.fvu, stats.aux_loss, stats.balance, stats.l0, stats.router_entropy]
    values += [zero if norm is None else norm, zero + n_dead]
    parts = [torch.stack(values), stats.expert_share]
    if sparsity is not None:
        parts.append(torch.stack([sparsity, zero + stats.dense]))
    if config.train.peers:
        parts.append(stats.mutual[None])
    if stats.measured:
        parts.append(torch.stack([stats.measured[name].to(zero) for name in end_to_end.SUMS]))
    return torch.cat(parts)
