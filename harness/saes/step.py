"""One training step of one SAE: loss and all gradients, by hand (no autograd), on any mesh.

L = mean_tokens ‖x − x̂‖²/V + α·AuxK + λ·E·Σ_i f_i·P_i   (design: "Maths, fixed once").
Tokens are averaged over the *global* batch. For TopK the ranks of a replica hold the same tokens and a part of the
latents; for Switch they hold whole experts and so disjoint tokens. That is the only difference in what is summed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.ops import Codes, Groups, Reduce
from harness.ops.untyped import entr, integers
from harness.parallel import Axis, Kind, Shards
from harness.process.runtime import Runtime
from harness.saes.router import Routing, route, router_grads
from harness.saes.sae import Params, Sae


@dataclass(frozen=True)
class DeadLatents:
    """The latents AuxK may use, renewed every few steps."""

    rows: Int[Tensor, " dead"]
    """Local rows, ascending."""
    row_offsets: tuple[int, ...]
    """Where each local group's dead latents begin in `rows`."""
    k: int
    """min(configured k_aux, number of dead latents in the largest group, over all shards for TopK)."""
    total: int
    """Dead latents on all shards."""


@dataclass(frozen=True)
class Stats:
    """Measurements of one step over the global batch; device tensors in the parameters' precision."""

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    """Σ‖x − x̂‖² / (V·tokens): the training value, from before the update."""
    aux_loss: Float[Tensor, ""]
    """AuxK, before α."""
    balance: Float[Tensor, ""]
    """E·Σ f_i·P_i, before λ; 1 when balanced."""
    l0: Float[Tensor, ""]
    """Mean number of latents with z > 0."""
    router_entropy: Float[Tensor, ""]
    """Mean over tokens, in nats."""
    expert_share: Float[Tensor, " experts"]
    fired: Int[Tensor, " rows"]
    """Tokens of the global batch that each local latent fired on."""


def find_dead(sae: Sae, dead: Bool[Tensor, " rows"], shards: Shards) -> DeadLatents | None:
    """The dead local latents by group; None if no shard has any, or if AuxK is off.

    Waits for the device, so it is called only every few steps.
    """
    if sae.aux_alpha == 0:
        return None
    per_group = dead.view(-1, sae.latents_per_expert if sae.routed else dead.shape[0]).sum(dim=1)
    # a token of TopK selects among the dead latents of all shards, a token of Switch among those of its expert
    total = shards.sum_(per_group.sum(), "shard", "scalars")
    available = per_group.max() if sae.routed else total
    *counts, most, everywhere = integers(torch.cat([per_group, available[None], total[None]]))
    if not everywhere:
        return None
    offsets = (0, *itertools.accumulate(counts))
    return DeadLatents(dead.nonzero().squeeze(1), offsets, max(1, min(sae.aux_k, most)), everywhere)


def _active(sae: Sae, codes: Codes, k: int, shards: Shards, kind: Kind) -> Codes:
    """ReLU, and only those candidates that are among the k largest over all shards."""
    values = codes.values.relu()
    if not sae.routed:
        kept = shards.keep(codes.values, k, kind)
        place = torch.arange(values.shape[1], device=values.device)
        values = values * (place < kept[:, None])
    return Codes(values, codes.index)


@dataclass(frozen=True)
class Encoded:
    """Results of the encoder, for this rank's own tokens."""

    routing: Routing
    centred: Float[Tensor, "own d"]
    """x − b_dec."""
    low: Float[Tensor, "own d"]
    """The same in the precision of the products."""
    codes: Codes
    """Active latents: values after ReLU."""


@dataclass(frozen=True)
class Forward(Encoded):
    """Results of the forward pass that the gradients need, for this rank's own tokens."""

    residual: Float[Tensor, "own d"]
    """x − x̂."""
    dz: Float[Tensor, "own k"]
    squared: Float[Tensor, " own"]
    """‖x − x̂‖² per token."""


def _reduce(sae: Sae, shards: Shards, kind: Kind) -> Reduce | None:
    """Partial reconstructions of TopK are summed over shards; those of Switch are complete (None)."""
    if sae.routed or shards.shard == 1:
        return None
    return lambda partial: shards.sum_(partial, "shard", kind)


def encode(sae: Sae, params: Params, compute: Params, x: Float[Tensor, "tokens d"], runtime: Runtime) -> Encoded:
    """Route and encode: z = ReLU(top_k(W_enc(x − b_dec) + b_enc))."""
    shards, ops = runtime.shards, runtime.ops
    routing = route(sae, params, x, shards)
    centred = routing.centred(x, params["b_dec"])
    low = centred.to(compute["W_enc"].dtype)
    codes = ops.select(low, compute["W_enc"], params.get("b_enc"), sae.k, routing.groups)
    return Encoded(routing, centred, low, _active(sae, codes, sae.k, shards, "selection"))


def forward(sae: Sae, params: Params, compute: Params, x: Float[Tensor, "tokens d"], runtime: Runtime) -> Forward:
    """Encode and decode: x̂ = scale·W_decᵀz + b_dec."""
    run = encode(sae, params, compute, x, runtime)
    routing, reduce = run.routing, _reduce(sae, runtime.shards, "reconstruction")
    residual, dz, squared = runtime.ops.reconstruct(
        run.codes, compute["W_dec"], run.centred, routing.scale, routing.groups, reduce
    )
    return Forward(routing, run.centred, run.low, run.codes, residual, dz, squared)


def _scaled(values: Float[Tensor, "own k"], factor: float | Tensor, scale: Float[Tensor, " own"] | None) -> Tensor:
    values = values * factor
    return values if scale is None else values * scale[:, None]


def step(
    sae: Sae,
    params: Params,
    compute: Params,
    x: Float[Tensor, "tokens d"],
    runtime: Runtime,
    dead: DeadLatents | None,
    grads: Params,
) -> Stats:
    """Loss of one batch and, written into `grads`, the gradient of every parameter over the global batch.

    `params` are the master weights, `compute` the W_enc and W_dec that products use (a low-precision copy, or the
    same tensors), `x` this replica's normalised tokens. `grads` has an entry for each parameter and always one for
    b_enc, since b_dec's gradient is made from it. No host synchronisation with one expert.
    """
    shards, ops = runtime.shards, runtime.ops
    own_tokens: Axis = "all" if sae.routed else "dp"
    global_tokens = x.shape[0] * shards.dp
    run = forward(sae, params, compute, x, runtime)
    routing, codes, residual = run.routing, run.codes, run.residual
    factor = -2.0 / (sae.variance * global_tokens)

    out = (grads["W_enc"], grads["W_dec"], grads["b_enc"])
    weighted = Codes(_scaled(codes.values, factor, routing.scale), codes.index)
    ops.weight_grads(weighted, _scaled(run.dz, factor, routing.scale), run.low, residual, routing.groups, out)
    aux_loss = residual.new_zeros(())
    if dead is not None:
        aux_loss = _aux(sae, params, compute, run, dead, global_tokens, own_tokens, runtime, grads)

    # the ranks of a TopK replica hold the same residual, so one of them counts it
    decoder_part = factor * residual.sum(dim=0) if sae.routed or shards.shard_rank == 0 else 0.0
    grads["b_dec"].copy_(decoder_part - grads["b_enc"] @ params["W_enc"])
    sums = torch.stack([run.squared.sum(), residual.new_zeros(())])
    share = residual.new_ones(1)
    if sae.routed:
        scale_grad = factor * (codes.values * run.dz).sum(dim=1)
        assert routing.probabilities is not None and routing.counts is not None
        share = shards.sum_(routing.counts.to(residual.dtype), "dp", "scalars") / global_tokens
        router_grads(sae, params, run.centred, routing, share, scale_grad, global_tokens, grads)
        sums[1] = entr(routing.probabilities).sum()
        sums = torch.cat([sums, routing.probabilities.sum(dim=0)])
    for name, cut in sae.layout().items():
        shards.sum_(grads[name], "dp" if cut == "latent_rows" else "all", "gradients")

    sums = shards.sum_(sums, own_tokens, "scalars")
    fired = ops.fired(codes, params["W_enc"].shape[0])
    active = shards.sum_(fired.sum(), "all", "scalars")
    fvu = sums[0] / (sae.variance * global_tokens)
    balance = sae.n_experts * (share * sums[2:] / global_tokens).sum() if sae.routed else share.new_ones(())
    return Stats(
        loss=fvu + sae.aux_alpha * aux_loss + sae.balance_weight * balance,
        fvu=fvu,
        aux_loss=aux_loss,
        balance=balance,
        l0=active.to(residual.dtype) / global_tokens,
        router_entropy=sums[1] / global_tokens,
        expert_share=share,
        fired=shards.sum_(fired, "dp", "counters"),
    )


def _aux(
    sae: Sae,
    params: Params,
    compute: Params,
    run: Forward,
    dead: DeadLatents,
    global_tokens: int,
    own_tokens: Axis,
    runtime: Runtime,
    grads: Params,
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, appendix A.2): reconstruct the residual e from the k_aux largest dead latents.

    Σ‖ê − e‖² / Σ‖e − mean e‖² over the global batch, e and the denominator without gradient, 0/0 → 0. The same
    operations as the main path, on the gathered dead rows; for Switch within the routed expert, ê scaled by p
    without gradient. Adds α times its gradient to W_enc, W_dec and b_enc.
    """
    shards, ops = runtime.shards, runtime.ops
    routing, target = run.routing, run.residual
    groups = Groups(routing.groups.token_offsets, dead.row_offsets)
    W_enc, W_dec = compute["W_enc"][dead.rows], compute["W_dec"][dead.rows]
    b_enc = params["b_enc"][dead.rows] if sae.enc_bias else None
    # only the choice among shards needs the order
    codes = ops.select(run.low, W_enc, b_enc, dead.k, groups, ordered=shards.shard > 1)
    codes = _active(sae, codes, dead.k, shards, "auxk")
    error, dz, squared = ops.reconstruct(codes, W_dec, target, routing.scale, groups, _reduce(sae, shards, "auxk"))

    moments = torch.cat([target.sum(dim=0), run.squared.sum()[None], squared.sum()[None]])
    moments = shards.sum_(moments, own_tokens, "auxk")
    spread = moments[-2] - moments[:-2].square().sum() / global_tokens
    inverse = torch.where(spread > 0, 1 / spread, 0.0)

    factor = -2.0 * sae.aux_alpha * inverse
    weighted = Codes(_scaled(codes.values, factor, routing.scale), codes.index)
    count = dead.rows.shape[0]
    out = (
        grads["W_enc"].new_empty(count, sae.d_model),
        grads["W_dec"].new_empty(count, sae.d_model),
        grads["b_enc"].new_empty(count),
    )
    ops.weight_grads(weighted, _scaled(dz, factor, routing.scale), run.low, error, groups, out)
    for name, grad in zip(("W_enc", "W_dec", "b_enc"), out, strict=True):
        grads[name].index_add_(0, dead.rows, grad)
    return moments[-1] * inverse
