"""The reference: every operation in plain torch, any dtype, any device, exact. See `interface` for the contracts.

Two forms, equal in what they compute: *sparse* (gathers over the active latents) and, where a group has few latents
per active one, *dense* (products over the group's whole width).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from harness.ops.interface import AdamState, Codes, Groups, Hyper, Reduce
from harness.ops.untyped import norm

NAME = "reference"

DENSE_ROWS_PER_K = 7
"""A group of at most this many latents per active one is computed as dense products, as the CPU kernels do."""

_BLOCK_ELEMENTS = 1 << 21
"""Tiles hold about this many numbers, so that they stay in a CPU's cache and are bounded everywhere."""


def _blocks(start: int, stop: int, width: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS // max(1, width))
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def select_preactivations(preactivations: Float[Tensor, "tokens rows"], k: int) -> Codes:
    """Exact top-k of given pre-activations, equal values to the lowest index; k ≤ rows."""
    rows = preactivations.shape[1]
    values, index = preactivations.topk(min(k + 1, rows), dim=1)
    if rows > k:
        # topk may break a tie at the k-th place either way; only such rows pay for a stable sort
        tied = values[:, k - 1] == values[:, k]
        values, index = values[:, :k], index[:, :k]
        if bool(tied.any()):
            values, index = values.clone(), index.clone()
            sorted_values, sorted_index = preactivations[tied].sort(dim=1, descending=True, stable=True)
            values[tied], index[tied] = sorted_values[:, :k], sorted_index[:, :k]
    index, by_index = index.sort(dim=1)
    values, by_value = values.gather(1, by_index).sort(dim=1, descending=True, stable=True)
    return Codes(values, index.gather(1, by_value))


def select(
    x: Float[Tensor, "tokens d"],
    W_enc: Float[Tensor, "rows d"],
    b_enc: Float[Tensor, " rows"] | None,
    k: int,
    groups: Groups,
    ordered: bool = True,  # always ordered
) -> Codes:
    tokens = x.shape[0]
    values = torch.full((tokens, k), -torch.inf, dtype=x.dtype, device=x.device)
    index = torch.zeros((tokens, k), dtype=torch.int64, device=x.device)
    bias = None if b_enc is None else b_enc.to(x.dtype)
    for token_span, row_span in groups.spans:
        width = row_span.stop - row_span.start
        index[token_span] = min(row_span.start, max(0, W_enc.shape[0] - 1))
        if width == 0:
            continue
        weight, offset = W_enc[row_span], None if bias is None else bias[row_span]
        kept = min(k, width)
        for block in _blocks(token_span.start, token_span.stop, width):
            codes = select_preactivations(F.linear(x[block], weight, offset), kept)
            values[block, :kept] = codes.values
            index[block, :kept] = codes.index + row_span.start
    return Codes(values.to(_wide(x.dtype)), index)


def select_above(
    x: Float[Tensor, "tokens d"],
    W_enc: Float[Tensor, "rows d"],
    b_enc: Float[Tensor, " rows"] | None,
    theta: Float[Tensor, " rows"],
    groups: Groups,
) -> Codes:
    tokens, device, wide = x.shape[0], x.device, _wide(x.dtype)
    bias = None if b_enc is None else b_enc.to(x.dtype)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    firsts = torch.zeros(tokens, dtype=torch.int64, device=device)
    for token_span, row_span in groups.spans:
        firsts[token_span] = min(row_span.start, max(0, W_enc.shape[0] - 1))
        width = row_span.stop - row_span.start
        if width == 0:
            continue
        for block in _blocks(token_span.start, token_span.stop, width):
            products = F.linear(x[block], W_enc[row_span], None if bias is None else bias[row_span]).to(wide)
            token, row = (~(products < theta[row_span].to(wide))).nonzero(as_tuple=True)
            parts.append((token + block.start, row + row_span.start, products[token, row]))
    return padded(tokens, firsts, parts, wide)


def padded(
    tokens: int, firsts: Int[Tensor, " tokens"], parts: list[tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype
) -> Codes:
    """Codes from lists of entries (token, row, value), which are ordered by token, then by row."""
    device = firsts.device
    token = torch.cat([part[0] for part in parts]) if parts else firsts[:0]
    counts = torch.zeros(tokens, dtype=torch.int64, device=device).index_add_(0, token, torch.ones_like(token))
    capacity = max(1, int(counts.max())) if tokens else 1
    values = torch.full((tokens, capacity), -torch.inf, dtype=dtype, device=device)
    index = firsts[:, None].repeat(1, capacity)
    if parts:
        column = torch.arange(token.shape[0], device=device) - (counts.cumsum(0) - counts)[token]
        index[token, column] = torch.cat([part[1] for part in parts])
        values[token, column] = torch.cat([part[2] for part in parts])
    return Codes(values, index)


def dense_rows_per_k(precision: str) -> int:
    return DENSE_ROWS_PER_K


def list_length(rows: int) -> int:
    return rows


def centred(
    x: Float[Tensor, "tokens d"], order: Int[Tensor, " own"] | None, offset: Float[Tensor, " d"], dtype: torch.dtype
) -> tuple[Float[Tensor, "own d"], Float[Tensor, "own d"]]:
    rows = x - offset if order is None else x[order].sub_(offset)
    return rows, rows.to(dtype)


def _is_dense(width: int, k: int) -> bool:
    return width <= DENSE_ROWS_PER_K * k


def _densify(codes: Codes, block: slice, rows: slice) -> Float[Tensor, "tokens rows"]:
    dense = codes.values.new_zeros(block.stop - block.start, rows.stop - rows.start)
    # padding points at the group's first row with value 0, so it must add, not overwrite
    return dense.scatter_add_(1, codes.index[block] - rows.start, codes.values[block])


def reconstruct(
    codes: Codes,
    W_dec: Float[Tensor, "rows d"],
    x: Float[Tensor, "tokens d"],
    scale: Float[Tensor, " tokens"] | None,
    groups: Groups,
    reduce: Reduce | None = None,
) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens k"], Float[Tensor, " tokens"]]:
    weight = W_dec.to(_wide(W_dec.dtype))
    k = codes.values.shape[1]
    partial = torch.zeros(x.shape, dtype=weight.dtype, device=x.device)
    for token_span, row_span in groups.spans:
        width = row_span.stop - row_span.start
        if width == 0:
            continue
        if _is_dense(width, k):
            for block in _blocks(token_span.start, token_span.stop, width):
                partial[block] = _densify(codes, block, row_span) @ weight[row_span]
        elif token_span.stop > token_span.start:
            partial[token_span] = F.embedding_bag(
                codes.index[token_span], weight, mode="sum", per_sample_weights=codes.values[token_span]
            )
    if scale is not None:
        partial *= scale[:, None]
    if reduce is not None:
        partial = reduce(partial)
    residual = torch.sub(x, partial, out=partial)
    return residual, latent_grads(codes, W_dec, residual, groups), residual.square().sum(dim=1)


def latent_grads(
    codes: Codes, W_dec: Float[Tensor, "rows d"], residual: Float[Tensor, "tokens d"], groups: Groups
) -> Float[Tensor, "tokens k"]:
    weight, k = W_dec.to(_wide(W_dec.dtype)), codes.values.shape[1]
    dz = torch.zeros_like(codes.values)
    for token_span, row_span in groups.spans:
        width = row_span.stop - row_span.start
        if width == 0:
            continue
        if _is_dense(width, k):
            for block in _blocks(token_span.start, token_span.stop, width):
                products = residual[block] @ weight[row_span].T
                dz[block] = products.gather(1, codes.index[block] - row_span.start)
        else:
            for block in _blocks(token_span.start, token_span.stop, k * residual.shape[1]):
                dz[block] = torch.bmm(weight[codes.index[block]], residual[block, :, None]).squeeze(2)
    dz *= codes.values > 0
    return dz


def latent_sums(values: Float[Tensor, "tokens k"], index: Int[Tensor, "tokens k"], rows: int) -> Float[Tensor, " rows"]:
    sums = torch.zeros(rows, dtype=values.dtype, device=values.device)
    if values.device.type == "cpu":
        return sums.index_add_(0, index.flatten(), values.flatten())
    # sorts first, where index_add_ adds in any order
    return sums.index_put_((index.flatten(),), values.flatten(), accumulate=True)


def weight_grads(
    codes: Codes,
    dz: Float[Tensor, "tokens k"],
    x: Float[Tensor, "tokens d"],
    residual: Float[Tensor, "tokens d"],
    groups: Groups,
    out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
) -> None:
    W_enc_grad, W_dec_grad, b_enc_grad = out
    k = codes.values.shape[1]
    inputs = x.to(W_enc_grad.dtype)
    for grad in out:
        grad.zero_()
    if b_enc_grad.shape[0] == 0:
        return
    b_enc_grad.index_add_(0, codes.index.flatten(), dz.flatten())
    for token_span, row_span in groups.spans:
        width = row_span.stop - row_span.start
        if width == 0 or token_span.stop == token_span.start:
            continue
        if _is_dense(width, k):
            for block in _blocks(token_span.start, token_span.stop, width):
                W_dec_grad[row_span] += _densify(codes, block, row_span).T @ residual[block]
                W_enc_grad[row_span] += _densify(Codes(dz, codes.index), block, row_span).T @ inputs[block]
            continue
        # one sort by latent serves both gradients: a latent's tokens are a bag of rows of x and of the residual
        by_latent = codes.index[token_span].flatten().argsort(stable=True)
        tokens = by_latent.div(k, rounding_mode="floor")
        counts = torch.bincount(codes.index[token_span].flatten() - row_span.start, minlength=width)
        offsets = counts.cumsum(0) - counts
        for grad, table, weights in (
            (W_enc_grad, inputs[token_span], dz[token_span]),
            (W_dec_grad, residual[token_span], codes.values[token_span]),
        ):
            grad[row_span] = F.embedding_bag(
                tokens, table, offsets, mode="sum", per_sample_weights=weights.flatten()[by_latent]
            )


def fired(codes: Codes, rows: int) -> Int[Tensor, " rows"]:
    counts = torch.zeros(rows, dtype=torch.int64, device=codes.index.device)
    return counts.index_add_(0, codes.index.flatten(), (codes.values > 0).flatten().to(torch.int64))


def project(param: Float[Tensor, "rows d"], grad: Float[Tensor, "rows d"]) -> None:
    grad -= (grad * param).sum(dim=1, keepdim=True) * param


def update(
    param: Tensor,
    grad: Tensor,
    state: AdamState,
    hyper: Hyper,
    ok: Bool[Tensor, ""],
    low_precision: Tensor | None = None,
) -> None:
    if hyper.project:
        project(param, grad)
    if hyper.scale is not None:
        grad = grad * hyper.scale
    # a withheld update must leave every bit: with weight 0 and gradient 0, m + 0·(0 − m) is m, whatever m is
    grad = torch.where(ok, grad, 0.0)
    weight = ok.to(param.dtype)
    state.mean.lerp_(grad, weight * (1 - hyper.beta1))
    state.square.lerp_(grad.square(), weight * (1 - hyper.beta2))
    denominator = (state.square / (1 - hyper.beta2**hyper.step)).sqrt_().add_(hyper.eps)
    param -= state.mean / denominator * (weight * (hyper.lr / (1 - hyper.beta1**hyper.step)))
    if hyper.unit_rows:
        norms = norm(param, dim=1, keepdim=True)
        param /= torch.where(ok, norms, torch.ones_like(norms))
    if low_precision is not None:
        low_precision.copy_(param)
