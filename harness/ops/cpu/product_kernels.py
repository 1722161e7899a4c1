"""Loops of the sparse products and of both weight gradients. See `compile` for what holds for all loops."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from harness.ops.cpu.compile import compiled


@register_jitable
def _add_rows(total, table, rows, weights, count):
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
def _dots(vector, table, rows, count, products):
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
def decode(begin, end, values, index, W_dec, scale, out):
    """out[t] = scale[t]·Σ_j values[t, j]·W_dec[index[t, j]]; `scale` of length 0 is 1."""
    k = values.shape[1]
    rows, weights = np.empty(k, np.int64), np.empty(k, np.float32)
    for t in range(begin, end):
        count = _nonzero(values[t], index[t], scale[t] if scale.shape[0] else np.float32(1.0), rows, weights)
        out[t, :] = np.float32(0.0)
        _add_rows(out[t], W_dec, rows, weights, count)


@register_jitable
def _nonzero(values, index, factor, rows, weights):
    """Gather the entries with value ≠ 0; returns how many. Codes are 0 behind the ReLU and where padded."""
    count = 0
    for j in range(values.shape[0]):
        if values[j] != 0:
            rows[count] = index[j]
            weights[count] = factor * values[j]
            count += 1
    return count


@compiled
def latent_grads(begin, end, values, index, W_dec, residual, dz, squared):
    """dz[t, j] = ⟨residual[t], W_dec[index[t, j]]⟩ where values[t, j] > 0, else 0; squared[t] = ‖residual[t]‖²."""
    k = values.shape[1]
    rows, products = np.empty(k, np.int64), np.empty(k, np.float32)
    for t in range(begin, end):
        squared[t] = _latent_grads(values[t], index[t], W_dec, residual[t], dz[t], rows, products)


@register_jitable
def _latent_grads(values, index, W_dec, residual, dz, rows, products):
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
def reconstruct(begin, end, values, index, W_dec, x, scale, residual, dz, squared):
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
def densify(begin, end, first_token, values, index, first_row, out):
    """out[t − first_token, index[t, j] − first_row] += values[t, j], on zeros."""
    for t in range(begin, end):
        row = out[t - first_token]
        row[:] = np.float32(0.0)
        for j in range(values.shape[1]):
            if values[t, j] != 0:
                row[index[t, j] - first_row] += values[t, j]


@compiled
def gather_products(begin, end, values, index, first_row, products, residual, dz, squared):
    """`latent_grads` from products[t − begin] = residual[t] with every row of the group, from `first_row` on."""
    for t in range(begin, end):
        for j in range(values.shape[1]):
            dz[t, j] = products[t - begin, index[t, j] - first_row] if values[t, j] > 0 else np.float32(0.0)
        squared[t] = _square(residual[t])


@register_jitable
def _square(vector):
    total = np.float32(0.0)
    for i in range(vector.shape[0]):
        total += vector[i] * vector[i]
    return total


# --- weight gradients ------------------------------------------------------------------------------------------------


@compiled
def count_by_latent(begin, end, values, dz, index, counts):
    """counts[latent] += its entries among these tokens; entries with value and dz 0 are left out."""
    for t in range(begin, end):
        for j in range(values.shape[1]):
            if values[t, j] != 0 or dz[t, j] != 0:
                counts[index[t, j]] += 1


@compiled
def sort_by_latent(begin, end, values, dz, index, place, token, weight_enc, weight_dec):
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
def accumulate(begin, end, pieces, token, weight_enc, weight_dec, x, residual, W_enc, W_dec, b_enc):
    """For each piece (row to write, first entry, end): the row's sums of weight_enc·x, weight_dec·residual and
    weight_enc over these entries."""
    for piece in range(begin, end):
        row, first, last = pieces[piece, 0], pieces[piece, 1], pieces[piece, 2]
        W_enc[row, :] = np.float32(0.0)
        W_dec[row, :] = np.float32(0.0)
        total = np.float32(0.0)
        _add_rows(W_enc[row], x, token[first:last], weight_enc[first:last], last - first)
        _add_rows(W_dec[row], residual, token[first:last], weight_dec[first:last], last - first)
        for entry in range(first, last):
            total += weight_enc[entry]
        b_enc[row] = total


@compiled
def count_active(values, index, counts):
    """counts[latent] += number of tokens with value > 0."""
    for t in range(values.shape[0]):
        for j in range(values.shape[1]):
            if values[t, j] > 0:
                counts[index[t, j]] += 1
