"""Nested reconstructions: of blocks 1 … b of the entries, each made from the one before, so that no entry is decoded
twice."""

from __future__ import annotations

from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from harness.ops.interface import Codes, Groups, Nesting, Ops, Reduce, is_whole


def reconstruct_nested(
    ops: Ops,
    codes: Codes,
    nesting: Nesting,
    W_dec: Float[Tensor, "rows d"],
    x: Float[Tensor, "tokens d"],
    groups: Groups,
    reduce: Reduce | None,
) -> tuple[
    Float[Tensor, "tokens d"],
    Float[Tensor, "blocks tokens d"],
    Float[Tensor, "tokens k"],
    Float[Tensor, "blocks tokens"],
]:
    """(the headline's residual, pulls, dz, squared errors).

    pulls[b] = Σ over the reconstructions that block b takes part in of weight·residual; dz[t, j] = ⟨pulls[b, t],
    W_dec[index_tj]⟩ for an entry of block b where z > 0, else 0; squared[b, t] = ‖residual of blocks 1 … b‖²."""
    fused = _fused(ops, codes, W_dec)
    if reduce is None and fused is not None:
        return fused.reconstruct_nested(codes, nesting, W_dec, x)
    left, weights = x, nesting.weights
    parts = [Codes(codes.values.where(nesting.block == b, 0.0), codes.index) for b in range(len(weights))]
    residuals: list[Tensor] = []
    errors: list[Tensor] = []
    dz = torch.zeros_like(codes.values)
    for part in parts:
        left, dz, squared = ops.reconstruct(part, W_dec, left, None, groups, reduce)
        residuals.append(left)
        errors.append(squared)
    pulls: list[Tensor] = [weights[-1] * residuals[-1]]
    dz = weights[-1] * dz
    for weight, part, residual in zip(
        reversed(weights[:-1]), reversed(parts[:-1]), reversed(residuals[:-1]), strict=True
    ):
        pulls.append(torch.add(pulls[-1], residual, alpha=weight))
        dz += ops.latent_grads(part, W_dec, pulls[-1], groups)
    return residuals[nesting.headline], torch.stack(pulls[::-1]), dz, torch.stack(errors)


def nested_weight_grads(
    ops: Ops,
    codes: Codes,
    dz: Float[Tensor, "tokens k"],
    nesting: Nesting,
    x: Float[Tensor, "tokens d"],
    pulls: Float[Tensor, "blocks tokens d"],
    groups: Groups,
    out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
) -> None:
    """`Ops.weight_grads` with the pull of each entry's block in place of the residual."""
    fused = _fused(ops, codes, out[0])
    if fused is not None:
        fused.nested_weight_grads(codes, dz, nesting, x, pulls, out)
        return
    for block, pull in enumerate(pulls):
        members = nesting.block == block
        values = codes.values.where(members, 0.0)
        part = out if block == 0 else (torch.empty_like(out[0]), torch.empty_like(out[1]), torch.empty_like(out[2]))
        ops.weight_grads(Codes(values, codes.index), dz.where(members, 0.0), x, pull, groups, part)
        if block:
            for grad, more in zip(out, part, strict=True):
                grad += more


@runtime_checkable
class Fused(Protocol):
    """A kernel set that does all blocks at once, for a single group of latents in float32."""

    def reconstruct_nested(
        self, codes: Codes, nesting: Nesting, W_dec: Float[Tensor, "rows d"], x: Float[Tensor, "tokens d"]
    ) -> tuple[
        Float[Tensor, "tokens d"],
        Float[Tensor, "blocks tokens d"],
        Float[Tensor, "tokens k"],
        Float[Tensor, "blocks tokens"],
    ]: ...

    def nested_weight_grads(
        self,
        codes: Codes,
        dz: Float[Tensor, "tokens k"],
        nesting: Nesting,
        x: Float[Tensor, "tokens d"],
        pulls: Float[Tensor, "blocks tokens d"],
        out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
    ) -> None: ...


def _fused(ops: Ops, codes: Codes, matrix: Float[Tensor, "rows d"]) -> Fused | None:
    """The kernel set, if it does all blocks at once and products are not dense."""
    if not hasattr(ops, "reconstruct_nested") or matrix.dtype is not torch.float32 or is_whole(codes.index):
        return None
    sparse = matrix.shape[0] > ops.dense_rows_per_k("fp32") * codes.values.shape[1]
    return cast(Fused, ops) if sparse else None
