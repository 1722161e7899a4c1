"""Selection, reconstruction and weight gradients of all groups on a GPU, put together from the kernels.

The host does not wait for the device: the kernels read the sizes of groups. Groups with few latents per active one are
products over their whole width (`grouped`), others are gathers (`decode`, `gradients`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from harness.ops import reference
from harness.ops.interface import Codes, Groups, Reduce, is_whole, whole_index
from harness.ops.sizes import DENSE_ROWS_PER_K, TILE_BYTES, kept_whole, padded
from harness.ops.triton import gradients
from harness.ops.triton.decode import decode
from harness.ops.triton.dense import aligned_rows, spread, subtract
from harness.ops.triton.grouped import latent_products, reconstructions, weight_gradients, wide
from harness.ops.triton.selection import fits, keep_positive, select_rows
from harness.ops.untyped import relu_backward_


def _widest(groups: Groups) -> int:
    rows = groups.row_offsets
    return max(after - before for before, after in itertools.pairwise(rows))


def _blocks(groups: Groups, tokens: int, row_bytes: int) -> Iterator[tuple[slice, Int[Tensor, " groups_plus_1"]]]:
    """Ranges of tokens whose tiles have at most `TILE_BYTES`, with the groups' token offsets inside."""
    size = max(1, TILE_BYTES // row_bytes)
    for begin in range(0, tokens, size):
        end, offsets = min(begin + size, tokens), groups.token_offsets
        yield slice(begin, end), offsets if size >= tokens else offsets.clamp(begin, end) - begin


def select(
    x: Float[Tensor, "tokens d"],
    W_enc: Float[Tensor, "rows d"],
    b_enc: Float[Tensor, " rows"] | None,
    k: int,
    groups: Groups,
    ordered: bool = True,
) -> Codes:
    (tokens, _), rows, widest = x.shape, W_enc.shape[0], _widest(groups)
    if x.dtype is torch.float64 or rows == 0 or not fits(widest, k):
        return reference.select(x, W_enc, b_enc, k, groups)
    x, bias = x.contiguous(), None if b_enc is None else b_enc.to(x.dtype)
    equal = widest * (len(groups.row_offsets) - 1) == rows and tokens > 1  # the form needs both
    if equal and not ordered and kept_whole(tokens, widest, k, _precision(x.dtype)):
        z = aligned_rows(tokens, widest, x.dtype, x.device)
        latent_products(x, W_enc, bias, groups.token_offsets, groups.row_starts, z)
        keep_positive(z, k)
        return Codes(z, whole_index(slice(0, widest), tokens, x.device))
    values = torch.empty((tokens, k), device=x.device)
    index = torch.empty((tokens, k), dtype=torch.int64, device=x.device)
    firsts, widths = groups.latents_of(tokens)
    for block, offsets in _blocks(groups, tokens, padded(widest) * x.element_size()):
        z = aligned_rows(block.stop - block.start, widest, x.dtype, x.device)
        latent_products(x[block], W_enc, bias, offsets, groups.row_starts, z)
        select_rows(z, k, firsts[block], widths[block], (values[block], index[block]), ordered)
        del z  # before the next tile is allocated
    return Codes(values, index)


def dense_rows_per_k(precision: str) -> int:
    return reference.dense_rows_per_k(precision) if precision == "fp64" else DENSE_ROWS_PER_K[precision]


def _precision(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "bf16"


def _is_dense(groups: Groups, k: int, dtype: torch.dtype) -> bool:
    return _widest(groups) <= DENSE_ROWS_PER_K[_precision(dtype)] * k


def _matrix(values: Float[Tensor, "tokens width"], dtype: torch.dtype) -> Float[Tensor, "tokens width"]:
    """Values of the whole form with aligned rows and zeros between them, as `select` returns them, or as a copy."""
    if values.dtype is dtype and values.stride() == (padded(values.shape[1]), 1):
        return values
    matrix = torch.zeros((values.shape[0], padded(values.shape[1])), dtype=dtype, device=values.device)
    matrix[:, : values.shape[1]] = values
    return matrix[:, : values.shape[1]]


def reconstruct(
    codes: Codes,
    W_dec: Float[Tensor, "rows d"],
    x: Float[Tensor, "tokens d"],
    scale: Float[Tensor, " tokens"] | None,
    groups: Groups,
    reduce: Reduce | None = None,
) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, "tokens k"], Float[Tensor, " tokens"]]:
    rows = W_dec.shape[0]
    if W_dec.dtype is torch.float64 or x.dtype is torch.float64 or rows == 0:
        return reference.reconstruct(codes, W_dec, x, scale, groups, reduce)
    (tokens, k), device = codes.values.shape, x.device
    x = x.contiguous()
    residual, squared = torch.empty(x.shape, device=device), torch.empty(tokens, device=device)
    if is_whole(codes.index):
        active = _matrix(codes.values, W_dec.dtype)
        reconstructions(active, W_dec, groups.token_offsets, groups.row_starts, residual)
        residual, scale = _reduced(residual, scale, reduce)
        low = subtract(x, scale, residual, squared, W_dec.dtype)
        return residual, _whole_latent_grads(low, W_dec, active, groups), squared
    values, index = codes.values.float().contiguous(), codes.index.contiguous()
    dz = torch.empty((tokens, k), device=device)
    if not _is_dense(groups, k, W_dec.dtype):
        out = (residual, dz, squared)
        decode(values, index, W_dec, x, scale, out, forward=True, backward=reduce is None)
        if reduce is None:
            return out
        out = (reduce(residual), dz, squared)
        decode(values, index, W_dec, x, None, out, forward=False, backward=True)
        return out
    widest, firsts = _widest(groups), groups.latents_of(tokens)[0]
    blocks = list(_blocks(groups, tokens, padded(widest) * 4))
    for block, offsets in blocks:
        active = spread(values[block], index[block], firsts[block], widest, W_dec.dtype)
        reconstructions(active, W_dec, offsets, groups.row_starts, residual[block])
    residual, scale = _reduced(residual, scale, reduce)
    columns = index - firsts[:, None]
    for block, offsets in blocks:
        own = None if scale is None else scale[block]
        low = subtract(x[block], own, residual[block], squared[block], W_dec.dtype)
        _dense_latent_grads(low, W_dec, values[block], columns[block], offsets, groups, dz[block])
    return residual, dz, squared


def _reduced(
    partial: Float[Tensor, "tokens d"], scale: Float[Tensor, " tokens"] | None, reduce: Reduce | None
) -> tuple[Float[Tensor, "tokens d"], Float[Tensor, " tokens"] | None]:
    """The reconstruction, and the factor that it still lacks."""
    if reduce is None:
        return partial, scale
    return reduce(partial if scale is None else partial.mul_(scale[:, None])), None


def _whole_latent_grads(
    residual: Float[Tensor, "tokens d"],
    W_dec: Float[Tensor, "rows d"],
    active: Float[Tensor, "tokens width"],
    groups: Groups,
) -> Float[Tensor, "tokens width"]:
    """In the form and the precision of `active`, a `_matrix`."""
    products = aligned_rows(active.shape[0], active.shape[1], active.dtype, active.device)
    latent_products(residual, W_dec, None, groups.token_offsets, groups.row_starts, products)
    relu_backward_(wide(products), wide(active))
    return products


def _dense_latent_grads(
    residual: Float[Tensor, "tokens d"],
    W_dec: Float[Tensor, "rows d"],
    values: Float[Tensor, "tokens k"],
    columns: Int[Tensor, "tokens k"],
    offsets: Int[Tensor, " groups_plus_1"],
    groups: Groups,
    out: Float[Tensor, "tokens k"],
) -> None:
    """Into `out`. `columns` is the place of each entry in its token's group, `offsets` the tokens of each group."""
    products = aligned_rows(residual.shape[0], _widest(groups), torch.float32, residual.device)
    latent_products(residual, W_dec, None, offsets, groups.row_starts, products)
    torch.gather(products, 1, columns, out=out)
    relu_backward_(out, values)


def latent_grads(
    codes: Codes, W_dec: Float[Tensor, "rows d"], residual: Float[Tensor, "tokens d"], groups: Groups
) -> Float[Tensor, "tokens k"]:
    values, (tokens, k) = codes.values, codes.values.shape
    if W_dec.dtype is torch.float64 or W_dec.shape[0] == 0:
        return reference.latent_grads(codes, W_dec, residual, groups)
    if is_whole(codes.index):
        low = residual.to(W_dec.dtype).contiguous()
        return _whole_latent_grads(low, W_dec, _matrix(values, W_dec.dtype), groups)
    if _is_dense(groups, k, W_dec.dtype):
        widest, firsts = _widest(groups), groups.latents_of(tokens)[0]
        low, columns = residual.to(W_dec.dtype).contiguous(), codes.index - firsts[:, None]
        dz = torch.empty((tokens, k), device=residual.device)
        for block, offsets in _blocks(groups, tokens, padded(widest) * 4):
            _dense_latent_grads(low[block], W_dec, values[block], columns[block], offsets, groups, dz[block])
        return dz
    nothing = torch.zeros(residual.shape, device=residual.device)
    out = (nothing, torch.empty(values.shape, device=values.device), nothing.new_empty(values.shape[0]))
    codes = Codes(values.float().contiguous(), codes.index.contiguous())
    decode(*codes, W_dec, residual.contiguous(), None, out, forward=False, backward=True)
    return out[1]


def weight_grads(
    codes: Codes,
    dz: Float[Tensor, "tokens k"],
    x: Float[Tensor, "tokens d"],
    residual: Float[Tensor, "tokens d"],
    groups: Groups,
    out: tuple[Float[Tensor, "rows d"], Float[Tensor, "rows d"], Float[Tensor, " rows"]],
) -> None:
    if out[0].dtype is torch.float64:
        return reference.weight_grads(codes, dz, x, residual, groups, out)
    (tokens, k), rows = codes.values.shape, out[0].shape[0]
    if rows == 0:
        return
    x, residual = x.contiguous(), residual.contiguous()
    if is_whole(codes.index):
        own = groups.token_offsets, groups.row_starts
        weight_gradients(_matrix(codes.values, x.dtype), residual.to(x.dtype), *own, out[1])
        weight_gradients(_matrix(dz, x.dtype), x, *own, out[0], out[2])
        return
    values, index, dz = codes.values.float().contiguous(), codes.index.contiguous(), dz.contiguous()
    if not _is_dense(groups, k, x.dtype):
        # in the precision of the products, as in the dense case: half the bytes to gather
        gradients.weight_grads(index, values, dz, x, residual.to(x.dtype), out)
        return
    if tokens == 0:
        for grad in out:
            grad.zero_()
        return
    widest, firsts = _widest(groups), groups.latents_of(tokens)[0]
    W_enc_grad, W_dec_grad, b_enc_grad = out
    for block, offsets in _blocks(groups, tokens, padded(widest) * 4):
        own, add = (offsets, groups.row_starts), block.start > 0
        active = spread(values[block], index[block], firsts[block], widest, x.dtype)
        weight_gradients(active, residual[block].to(x.dtype), *own, W_dec_grad, add=add)
        active = spread(dz[block], index[block], firsts[block], widest, x.dtype)
        weight_gradients(active, x[block], *own, W_enc_grad, b_enc_grad, add=add)
