"""One training step of one SAE: loss and all gradients, by hand (no autograd), on any mesh.

L = mean_tokens ‖x − x̂‖²/V + α·AuxK + λ·E·Σ_i f_i·P_i   (design: "Maths, fixed once"), and for SAEs with peers the
penalty of `saes.mutual`.
Tokens are averaged over the *global* batch. For TopK the ranks of a replica hold the same tokens and a part of the
latents; for Switch they hold whole experts and so disjoint tokens. That is the only difference in what is summed.
With THOR's consistency term a step sees each token twice, once for each of its two experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import Codes, Groups, Reduce, is_whole
from harness.ops.nested import nested_weight_grads, reconstruct_nested
from harness.ops.untyped import entr, norm
from harness.parallel import Axis, Kind, Shards
from harness.process.runtime import Runtime
from harness.saes.catalogue import ACTIVATIONS
from harness.saes.dead import DeadLatents, encoded_with_all
from harness.saes.entries import Backward, Batch, Entries
from harness.saes.mutual import Peers, draw_to_peers
from harness.saes.router import Routing, route, router_grads
from harness.saes.sae import Params, Sae
from harness.saes.topk import active


class Pull(NamedTuple):
    """What an objective other than the error of x̂ itself says of a batch, in one process."""

    loss: Float[Tensor, ""]
    """Averaged over tokens; it takes the place of fvu in the loss."""
    gradient: Float[Tensor, "tokens d"]
    """Of it with respect to x̂, for each token of the batch."""
    measured: Mapping[str, Float[Tensor, ""]]
    """What it consists of, for the record."""


Objective: TypeAlias = Callable[[Float[Tensor, "tokens d"]], Pull]
"""Called with x − x̂, in normalised units."""


@dataclass(frozen=True)
class Stats:
    """Measurements of one step over the global batch; device tensors in the parameters' precision."""

    loss: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    """Σ‖x − x̂‖² / (V·tokens): the training value, from before the update."""
    aux_loss: Float[Tensor, ""]
    """AuxK, before α."""
    balance: Float[Tensor, ""]
    """E·Σ f_i·P_i, before λ; 1 when balanced, and without a router that learns."""
    l0: Float[Tensor, ""]
    """Mean number of latents with z > 0."""
    router_entropy: Float[Tensor, ""]
    """Mean over tokens, in nats."""
    expert_share: Float[Tensor, " experts"]
    fired: Int[Tensor, " rows"]
    """Tokens of the global batch that each local latent fired on."""
    mutual: Float[Tensor, ""]
    """Mean over the peers of 1 − MMCS, before its weight; 0 without peers."""
    measured: Mapping[str, Float[Tensor, ""]]
    """Of an `Objective`; empty without one."""
    dense: bool
    """Whether this rank had more active latents than lists are for, and used dense products; nothing was cut."""


@dataclass(frozen=True)
class Forward:
    """Results of the forward pass, for this rank's own tokens."""

    batch: Batch
    entries: Entries
    residual: Float[Tensor, "own d"]
    """x − x̂."""
    squared: Float[Tensor, " own"]
    """‖x − x̂‖² per token."""
    dz: Float[Tensor, "own capacity"]
    """Σ over the reconstructions of weight·⟨x − x̂, W_dec row⟩ where z > 0: what the gradients are made of."""
    pulls: Float[Tensor, "blocks own d"]
    """For each block of entries, Σ over the reconstructions it takes part in of weight·(x − x̂)."""
    error: Float[Tensor, ""]
    """Σ over own tokens and reconstructions of weight·‖x − x̂‖²."""

    @property
    def routing(self) -> Routing:
        return self.batch.routing

    @property
    def codes(self) -> Codes:
        """The active latents."""
        return self.entries.codes

    @property
    def centred(self) -> Float[Tensor, "own d"]:
        """x − b_dec."""
        return self.batch.target


def _reduce(sae: Sae, shards: Shards, kind: Kind) -> Reduce | None:
    """Partial reconstructions are summed over shards; those of Switch are complete (None)."""
    if sae.routed or shards.shard == 1:
        return None
    return lambda partial: shards.sum_(partial, "shard", kind)


def encode(
    sae: Sae,
    params: Params,
    compute: Params,
    x: Float[Tensor, "tokens d"],
    runtime: Runtime,
    *,
    training: bool = False,
    done: int = 0,
    dead: DeadLatents | None = None,
) -> tuple[Batch, Entries]:
    """Route, encode and select. `training` allows what is for training alone: a choice among the whole batch, entries
    that only gradients need. `done`: completed steps. `dead`: latents that AuxK will choose from."""
    shards, pairs = runtime.shards, training and sae.consistency > 0
    x = torch.cat([x, x]) if pairs else x
    routing = route(sae, params, x, shards, done + 1 if training else 0, pairs)
    dtype = compute["W_enc"].dtype if sae.traits.pre_bias else x.dtype
    centred, inputs = runtime.ops.centred(x, routing.order, params["b_dec"], dtype)
    if not sae.traits.pre_bias:
        inputs = x.to(compute["W_enc"].dtype)
    reduce = _reduce(sae, shards, "reconstruction")
    tokens = x.shape[0] * shards.dp
    ops, dead = runtime.ops, dead if encoded_with_all(sae, inputs.dtype, shards, runtime.ops) else None
    batch = Batch(sae, params, compute, routing, centred, inputs, ops, shards, reduce, training, tokens, done, dead)
    return batch, ACTIVATIONS[sae.architecture].select(batch)


def forward(
    sae: Sae,
    params: Params,
    compute: Params,
    x: Float[Tensor, "tokens d"],
    runtime: Runtime,
    *,
    training: bool = False,
    done: int = 0,
    dead: DeadLatents | None = None,
) -> Forward:
    """Encode and decode: x̂ = scale·W_decᵀz + b_dec, and the nested reconstructions if there are any."""
    batch, entries = encode(sae, params, compute, x, runtime, training=training, done=done, dead=dead)
    ops, W_dec, groups = batch.ops, compute["W_dec"], batch.routing.groups
    if entries.nesting is None:
        codes = Codes(entries.z, entries.index)
        residual, dz, squared = ops.reconstruct(codes, W_dec, batch.target, batch.routing.scale, groups, batch.reduce)
        plain = Forward(batch, entries, residual, squared, dz, residual[None], squared.sum())
        return _drawn_together(plain, W_dec) if training and sae.consistency else plain
    nesting, codes = entries.nesting, Codes(entries.z, entries.index)
    residual, pulls, dz, errors = reconstruct_nested(ops, codes, nesting, W_dec, batch.target, groups, batch.reduce)
    error = errors.new_tensor(nesting.weights) @ errors.sum(dim=1)
    return Forward(batch, entries, residual, errors[nesting.headline], dz, pulls, error)


def _drawn_together(run: Forward, W_dec: Float[Tensor, "rows d"]) -> Forward:
    """The same forward pass with the loss and the gradient of α·½‖x̂₁ − x̂₂‖² of each token's two experts."""
    batch, order = run.batch, run.routing.order
    assert order is not None
    tokens = batch.global_tokens // batch.shards.dp
    residuals = torch.zeros(tokens, batch.sae.d_model, dtype=run.residual.dtype, device=run.residual.device)
    residuals[order] = run.residual
    batch.shards.sum_(residuals, "shard", "reconstruction")
    apart = run.residual - residuals.roll(tokens // 2, dims=0)[order]
    shift = batch.sae.consistency * apart
    # with a target moved by it, the residual is what pulls at x̂
    codes, groups = Codes(run.entries.z, run.entries.index), batch.routing.groups
    pull, dz, _ = batch.ops.reconstruct(codes, W_dec, batch.target + shift, None, groups)
    # each pair is here twice, and counts as two tokens
    return replace(run, dz=dz, pulls=pull[None], error=run.error + (shift * apart).sum() / 2)


def _pulled(run: Forward, W_dec: Float[Tensor, "rows d"], objective: Objective) -> tuple[Forward, Pull]:
    """The same forward pass with the gradients of another objective, and what that says of it."""
    batch, order = run.batch, run.routing.order
    told = objective(run.residual if order is None else run.residual[order.argsort()])
    # gradients are made from −2/(V·B)·pull, where the pull of the error itself is x − x̂
    pull = (told.gradient if order is None else told.gradient[order]) / batch.factor
    dz = batch.ops.latent_grads(Codes(run.entries.z, run.entries.index), W_dec, pull, run.routing.groups)
    return replace(run, dz=dz, pulls=pull[None]), told


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
    *,
    sparsity: Float[Tensor, ""] | float = 0.0,
    peers: Peers | None = None,
    done: int = 0,
    objective: Objective | None = None,
) -> Stats:
    """Loss of one batch and, written into `grads`, the gradient of every parameter over the global batch.

    `params` are the master weights, `compute` the W_enc and W_dec that products use (a low-precision copy, or the
    same tensors), `x` this replica's normalised tokens. `grads` has an entry for each parameter and always one for
    b_enc, since b_dec's gradient is made from it. `sparsity` is the coefficient of the penalty, `peers` draw this SAE
    to their features, `done` counts completed steps. `objective` takes the place of the error, for SAEs of a single
    reconstruction and in one process. No host synchronisation for TopK and for Switch with one expert.
    """
    shards, ops = runtime.shards, runtime.ops
    own_tokens: Axis = "all" if sae.routed else "dp"
    run, told = forward(sae, params, compute, x, runtime, training=True, done=done, dead=dead), None
    if objective is not None:
        run, told = _pulled(run, compute["W_dec"], objective)
    global_tokens = run.batch.global_tokens
    batch, entries, routing, residual = run.batch, run.entries, run.routing, run.residual
    factor = batch.factor

    # in place, unless the router needs it as it was
    dz = run.dz.mul_(factor) if routing.scale is None else _scaled(run.dz, factor, routing.scale)
    back = ACTIVATIONS[sae.architecture].backward(
        replace(batch, residual=run.pulls[0]), entries, dz, sparsity / global_tokens
    )
    _weight_grads(batch, entries, run.pulls, back, grads)
    aux_loss = residual.new_zeros(())
    if dead is not None:
        aux_loss = _aux(sae, params, compute, run, dead, global_tokens, own_tokens, runtime, grads)

    # the ranks of a replica hold the same residual unless it is routed, so one of them counts it
    counts = sae.routed or shards.shard_rank == 0
    b_dec_grad = factor * run.pulls[0].sum(dim=0) if counts else torch.zeros_like(params["b_dec"])
    if sae.traits.pre_bias:
        b_dec_grad = b_dec_grad - grads["b_enc"] @ params["W_enc"]
    grads["b_dec"].copy_(b_dec_grad)
    for name, grad in back.own.items():
        grads[name].copy_(grad)
    if sae.routing == "hash":
        for name in ("W_r", "b_r"):
            grads[name].zero_()
    sums = torch.stack([run.squared.sum(), residual.new_zeros(())])
    share = residual.new_ones(1)
    codes = run.codes
    if sae.routed:
        assert routing.counts is not None
        share = shards.sum_(routing.counts.to(residual.dtype), "dp", "scalars") / global_tokens
    if sae.learns_routing:
        assert routing.probabilities is not None
        scale_grad = factor * (codes.values * run.dz).sum(dim=1)
        router_grads(sae, params, run.centred, routing, share, scale_grad, global_tokens, grads)
        sums[1] = entr(routing.probabilities).sum()
        sums = torch.cat([sums, routing.probabilities.sum(dim=0)])
    mutual = residual.new_zeros(())
    if peers is not None:
        mutual = draw_to_peers(params["W_dec"], peers, shards, grads["W_dec"])
    for name, cut in sae.layout().items():
        shards.sum_(grads[name], "dp" if cut == "latent_rows" else "all", "gradients")

    sums = shards.sum_(sums, own_tokens, "scalars")
    fired = ops.fired(codes, params["W_enc"].shape[0])
    active = shards.sum_(fired.sum(), "all", "scalars")
    fvu = sums[0] / (sae.variance * global_tokens)
    balance = sae.n_experts * (share * sums[2:] / global_tokens).sum() if sae.learns_routing else share.new_ones(())
    further = _further_loss(run, back, shards)
    if peers is not None:
        further = further + peers.weight * mutual
    return Stats(
        loss=(fvu if told is None else told.loss) + sae.aux_alpha * aux_loss + sae.balance_weight * balance + further,
        fvu=fvu,
        aux_loss=aux_loss,
        balance=balance,
        l0=active.to(residual.dtype) / global_tokens,
        router_entropy=sums[1] / global_tokens,
        expert_share=share,
        fired=shards.sum_(fired, "dp", "counters"),
        mutual=mutual,
        measured={} if told is None else told.measured,
        dense=is_whole(entries.index),
    )


def _weight_grads(
    batch: Batch, entries: Entries, pulls: Float[Tensor, "blocks own d"], back: Backward, grads: Params
) -> None:
    """Write the gradients of W_enc, W_dec and b_enc (Σ da) of own tokens."""
    ops, groups, inputs = batch.ops, batch.routing.groups, batch.inputs
    out = (grads["W_enc"], grads["W_dec"], grads["b_enc"])
    weighted = Codes(_scaled(entries.z, batch.factor, batch.routing.scale), entries.index)
    if entries.nesting is None:
        ops.weight_grads(weighted, back.da, inputs, pulls[0], groups, out)
    else:
        nested_weight_grads(ops, weighted, back.da, entries.nesting, inputs, pulls, groups, out)
    if back.everywhere is not None:
        total = inputs.to(grads["W_enc"].dtype).sum(dim=0)
        grads["W_enc"].addr_(back.everywhere, total)
        grads["b_enc"].add_(back.everywhere, alpha=inputs.shape[0])
    if back.decoder_norm is not None:
        W_dec = batch.params["W_dec"]
        grads["W_dec"].addcmul_((back.decoder_norm / norm(W_dec, dim=1))[:, None], W_dec)


def _further_loss(run: Forward, back: Backward, shards: Shards) -> Float[Tensor, ""] | float:
    """The loss beyond fvu, AuxK and balance: further reconstructions, and penalties."""
    loss: Tensor | float = 0.0
    unit = run.batch.sae.variance * run.batch.global_tokens
    sae = run.batch.sae
    if run.entries.nesting is not None or sae.consistency:
        loss = shards.sum_((run.error - run.squared.sum()) / unit, "all" if sae.routed else "dp", "scalars")
    if back.token_loss is not None:
        loss = loss + shards.sum_(back.token_loss, "dp", "scalars")
    if back.latent_loss is not None:
        loss = loss + shards.sum_(back.latent_loss, "all", "scalars")
    return loss


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
    operations as the main path, on the dead rows; for Switch within the routed expert, ê scaled by p
    without gradient. Adds α times its gradient to W_enc, W_dec and b_enc.
    """
    shards, ops = runtime.shards, runtime.ops
    routing, target, inputs = run.routing, run.residual, run.batch.inputs
    groups = Groups(routing.groups.token_offsets, dead.row_offsets)
    among_shards = shards.shard > 1 and not sae.routed  # a choice that needs candidates in order
    W_dec, codes = compute["W_dec"][dead.rows], run.entries.dead
    if codes is None:
        W_enc, b_enc = compute["W_enc"][dead.rows], dead.barred
        if sae.enc_bias:
            own = params["b_enc"][dead.rows]
            b_enc = own if b_enc is None else own + b_enc
        codes = ops.select(inputs, W_enc, b_enc, dead.k, groups, ordered=among_shards)
    if among_shards:
        codes = Codes(active(sae, codes, dead.k, shards, "auxk"), codes.index)
    elif not is_whole(codes.index):  # the whole form has no negative values
        codes = Codes(codes.values.relu(), codes.index)
    error, dz, squared = ops.reconstruct(codes, W_dec, target, routing.scale, groups, _reduce(sae, shards, "auxk"))

    moments = torch.cat([target.sum(dim=0), run.squared.sum()[None], squared.sum()[None]])
    moments = shards.sum_(moments, own_tokens, "auxk")
    spread = moments[-2] - moments[:-2].square().sum() / global_tokens
    inverse = torch.where(spread > 0, 1 / spread, 0.0)

    if routing.scale is not None:
        # in place: the whole form keeps its precision and its aligned rows
        for numbers in (codes.values, dz):
            numbers.mul_(routing.scale[:, None])
    count = dead.rows.shape[0]
    out = (
        grads["W_enc"].new_empty(count, sae.d_model),
        grads["W_dec"].new_empty(count, sae.d_model),
        grads["b_enc"].new_empty(count),
    )
    ops.weight_grads(codes, dz, inputs, error, groups, out)
    # the loss's factor goes to the sums: they are fewer numbers than the codes
    factor = -2.0 * sae.aux_alpha * inverse
    for name, grad in zip(("W_enc", "W_dec", "b_enc"), out, strict=True):
        grads[name].index_add_(0, dead.rows, grad.mul_(factor))
    return moments[-1] * inverse
