"""Loops of the sparse products and of both weight gradients. See `compile` for what holds for all loops."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from harness.ops.cpu.compile import Bytes, Floats, Ints, Longs, compiled


@register_jitable
def _add_rows(total: Floats, table: Floats, rows: Longs | Ints, weights: Floats, count: int) -> None:
    """total += Σ weights[j]·table[rows[j]] over j < count, in order."""
    d = total.shape[0]
    j = 0
    while j + 4 <= count:
        a, b, c, e = table[rows[j]], table[rows[j + 1]], table[rows[j + 2]], table[rows[j + 3]]
        wa, wb, wc, we = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        for i in range(d):
            total[i] += wa * a[i] + wb * b[i] + wc * c[i] + we * e[i]
        j += 4
    while j < count:
        a, wa = table[rows[j]], weights[j]
        for i in range(d):
            total[i] += wa * a[i]
        j += 1


@register_jitable
def _dots(vector: Floats, table: Floats, rows: Longs, count: int, products: Floats) -> None:
    """products[j] = ⟨vector, table[rows[j]]⟩ for j < count."""
    d = vector.shape[0]
    zero = np.float32(0.0)
    j = 0
    while j + 4 <= count:
        a, b, c, e = table[rows[j]], table[rows[j + 1]], table[rows[j + 2]], table[rows[j + 3]]
        pa, pb, pc, pe = zero, zero, zero, zero
        for i in range(d):
            v = vector[i]
            pa += v * a[i]
            pb += v * b[i]
            pc += v * c[i]
            pe += v * e[i]
        products[j], products[j + 1], products[j + 2], products[j + 3] = pa, pb, pc, pe
        j += 4
    while j < count:
        a, pa = table[rows[j]], zero
        for i in range(d):
            pa += vector[i] * a[i]
        products[j] = pa
        j += 1


@compiled
def decode(begin: int, end: int, values: Floats, index: Longs, W_dec: Floats, scale: Floats, out: Floats) -> None:
    """out[t] = scale[t]·Σ_j values[t, j]·W_dec[index[t, j]]; `scale` of length 0 is 1."""
    k = values.shape[1]
    rows, weights = np.empty(k, np.int64), np.empty(k, np.float32)
    for t in range(begin, end):
        count = _nonzero(values[t], index[t], scale[t] if scale.shape[0] else np.float32(1.0), rows, weights)
        out[t, :] = np.float32(0.0)
        _add_rows(out[t], W_dec, rows, weights, count)


@register_jitable
def _nonzero(values: Floats, index: Longs, factor: np.float32, rows: Longs, weights: Floats) -> int:
    """Gather the entries with value ≠ 0; returns how many. Codes are 0 behind the ReLU and where padded."""
    count = 0
    for j in range(values.shape[0]):
        if values[j] != 0:
            rows[count] = index[j]
            weights[count] = factor * values[j]
            count += 1
    return count


@compiled
def latent_grads(
    begin: int, end: int, values: Floats, index: Longs, W_dec: Floats, residual: Floats, dz: Floats, squared: Floats
) -> None:
    """dz[t, j] = ⟨residual[t], W_dec[index[t, j]]⟩ where values[t, j] > 0, else 0; squared[t] = ‖residual[t]‖²."""
    k = values.shape[1]
    rows, products = np.empty(k, np.int64), np.empty(k, np.float32)
    for t in range(begin, end):
        squared[t] = _latent_grads(values[t], index[t], W_dec, residual[t], dz[t], rows, products)


@register_jitable
def _latent_grads(
    values: Floats, index: Longs, W_dec: Floats, residual: Floats, dz: Floats, rows: Longs, products: Floats
) -> np.float32:
    count = 0
    for j in range(values.shape[0]):
        if values[j] > 0:
            rows[count] = index[j]
            count += 1
    _dots(residual, W_dec, rows, count, products)
    count = 0
    for j in range(values.shape[0]):
        dz[j] = np.float32(0.0)
        if values[j] > 0:
            dz[j] = products[count]
            count += 1
    return _square(residual)


@compiled
def reconstruct(
    begin: int,
    end: int,
    values: Floats,
    index: Longs,
    W_dec: Floats,
    x: Floats,
    scale: Floats,
    residual: Floats,
    dz: Floats,
    squared: Floats,
) -> None:
    """`decode`, residual = x − x̂ and `latent_grads` of each token while its decoder rows are in cache."""
    k = values.shape[1]
    rows, weights, products = np.empty(k, np.int64), np.empty(k, np.float32), np.empty(k, np.float32)
    for t in range(begin, end):
        factor = -scale[t] if scale.shape[0] else np.float32(-1.0)
        count = _nonzero(values[t], index[t], factor, rows, weights)
        residual[t, :] = x[t]
        _add_rows(residual[t], W_dec, rows, weights, count)
        squared[t] = _latent_grads(values[t], index[t], W_dec, residual[t], dz[t], rows, products)


@compiled
def densify(begin: int, end: int, first_token: int, values: Floats, index: Longs, first_row: int, out: Floats) -> None:
    """out[t − first_token, index[t, j] − first_row] += values[t, j], on zeros."""
    for t in range(begin, end):
        row = out[t - first_token]
        row[:] = np.float32(0.0)
        for j in range(values.shape[1]):
            if values[t, j] != 0:
                row[index[t, j] - first_row] += values[t, j]


@compiled
def gather_products(
    begin: int,
    end: int,
    values: Floats,
    index: Longs,
    first_row: int,
    products: Floats,
    residual: Floats,
    dz: Floats,
    squared: Floats,
) -> None:
    """`latent_grads` from products[t − begin], which begins with the products of residual[t] with all rows of the
    group, from `first_row` on."""
    for t in range(begin, end):
        for j in range(values.shape[1]):
            dz[t, j] = products[t - begin, index[t, j] - first_row] if values[t, j] > 0 else np.float32(0.0)
        squared[t] = _square(residual[t])


@compiled
def mask_products(
    begin: int, end: int, values: Floats, products: Floats, residual: Floats, dz: Floats, squared: Floats
) -> None:
    """`gather_products` in the whole form."""
    for t in range(begin, end):
        for j in range(values.shape[1]):
            dz[t, j] = products[t - begin, j] if values[t, j] > 0 else np.float32(0.0)
        squared[t] = _square(residual[t])


@register_jitable
def _square(vector: Floats) -> np.float32:
    total = np.float32(0.0)
    for i in range(vector.shape[0]):
        total += vector[i] * vector[i]
    return total


@compiled
def reconstruct_nested(
    begin: int,
    end: int,
    values: Floats,
    index: Longs,
    block: Bytes,
    weights: Floats,
    headline: int,
    W_dec: Floats,
    x: Floats,
    residual: Floats,
    pulls: Floats,
    dz: Floats,
    squared: Floats,
) -> None:
    """See `harness.ops.nested`: all blocks of a token while its decoder rows are in cache."""
    k, blocks = values.shape[1], weights.shape[0]
    rows, factors, products = np.empty(k, np.int64), np.empty(k, np.float32), np.empty(k, np.float32)
    left = np.empty(x.shape[1], np.float32)
    for t in range(begin, end):
        left[:] = x[t]
        for b in range(blocks):
            count = 0
            for j in range(k):
                if values[t, j] != 0 and block[t, j] == b:
                    rows[count], factors[count] = index[t, j], -values[t, j]
                    count += 1
            _add_rows(left, W_dec, rows, factors, count)
            squared[b, t] = _square(left)
            if b == headline:
                residual[t] = left
            for i in range(left.shape[0]):
                pulls[b, t, i] = weights[b] * left[i]
        for b in range(blocks - 2, -1, -1):
            for i in range(left.shape[0]):
                pulls[b, t, i] += pulls[b + 1, t, i]
        dz[t, :] = np.float32(0.0)
        for b in range(blocks):
            count = 0
            for j in range(k):
                if values[t, j] > 0 and block[t, j] == b:
                    rows[count] = index[t, j]
                    count += 1
            _dots(pulls[b, t], W_dec, rows, count, products)
            count = 0
            for j in range(k):
                if values[t, j] > 0 and block[t, j] == b:
                    dz[t, j] = products[count]
                    count += 1


# --- weight gradients ------------------------------------------------------------------------------------------------


@compiled
def count_by_latent(begin: int, end: int, values: Floats, dz: Floats, index: Longs, counts: Longs) -> None:
    """counts[latent] += its entries among these tokens; entries with value and dz 0 are left out."""
    for t in range(begin, end):
        for j in range(values.shape[1]):
            if values[t, j] != 0 or dz[t, j] != 0:
                counts[index[t, j]] += 1


@compiled
def sort_by_latent(
    begin: int,
    end: int,
    values: Floats,
    dz: Floats,
    index: Longs,
    place: Longs,
    token: Ints,
    weight_enc: Floats,
    weight_dec: Floats,
) -> None:
    """The second half of a counting sort: move each entry to place[latent], which then advances."""
    for t in range(begin, end):
        for j in range(values.shape[1]):
            if values[t, j] != 0 or dz[t, j] != 0:
                latent = index[t, j]
                at = place[latent]
                place[latent] = at + 1
                token[at] = t
                weight_enc[at] = dz[t, j]
                weight_dec[at] = values[t, j]


@compiled
def sources_by_latent(
    begin: int, end: int, values: Floats, dz: Floats, index: Longs, block: Bytes, place: Longs, source: Ints
) -> None:
    """As `sort_by_latent`, for the row of the pulls (blocks·tokens, d) that belongs to an entry's block and token."""
    tokens = values.shape[0]
    for t in range(begin, end):
        for j in range(values.shape[1]):
            if values[t, j] != 0 or dz[t, j] != 0:
                latent = index[t, j]
                source[place[latent]] = block[t, j] * tokens + t
                place[latent] += 1


@compiled
def accumulate(
    begin: int,
    end: int,
    pieces: Longs,
    token: Ints,
    source: Ints,
    weight_enc: Floats,
    weight_dec: Floats,
    x: Floats,
    residual: Floats,
    W_enc: Floats,
    W_dec: Floats,
    b_enc: Floats,
) -> None:
    """For each piece (row to write, first entry, end): the row's sums of weight_enc·x[token],
    weight_dec·residual[source] and weight_enc over these entries."""
    for piece in range(begin, end):
        row, first, last = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
        W_enc[row, :] = np.float32(0.0)
        W_dec[row, :] = np.float32(0.0)
        total = np.float32(0.0)
        _add_rows(W_enc[row], x, token[first:last], weight_enc[first:last], last - first)
        _add_rows(W_dec[row], residual, source[first:last], weight_dec[first:last], last - first)
        for entry in range(first, last):
            total += weight_enc[entry]
        b_enc[row] = total


@compiled
def sum_by_latent(values: Floats, index: Longs, sums: Floats) -> None:
    """sums[latent] += its values, in the order of the tokens."""
    for t in range(values.shape[0]):
        for j in range(values.shape[1]):
            sums[index[t, j]] += values[t, j]


@compiled
def count_positive(values: Floats, counts: Longs) -> None:
    """counts[j] += number of tokens with values[t, j] > 0."""
    for t in range(values.shape[0]):
        for j in range(values.shape[1]):
            counts[j] += 1 if values[t, j] > 0 else 0


@compiled
def count_active(values: Floats, index: Longs, counts: Longs) -> None:
    """counts[latent] += number of tokens with value > 0."""
    for t in range(values.shape[0]):
        for j in range(values.shape[1]):
            if values[t, j] > 0:
                counts[index[t, j]] += 1
