"""The loops behind `cpu`, compiled by Numba on first use and cached. Single-threaded; they release the GIL.

Arrays are C-contiguous float32 unless said otherwise; bfloat16 comes as its int16 bit patterns. Each kernel works on a
range `begin … end` of tokens, latents or rows and writes nothing outside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload, register_jitable

log = logging.getLogger(__name__)


SHORT = 128
"""Keys that are sorted by counting."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile on first call; from Numba's cache on disk where there is a writable place for one.

    `reassoc` lets sums be split over vector lanes, in an order fixed at compile time; nothing else is relaxed, so
    NaN, infinities and ties keep their meaning.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}, "boundscheck": False}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # no writable cache directory
        log.info("compiled kernels are not cached: %s", error)
        return numba.njit(**options)(function)


def _widen(value):
    """A float32 from a stored number: itself, or the bfloat16 with these 16 bits."""
    raise NotImplementedError


@overload(_widen, inline="always")
def _widen_compiled(value):
    if isinstance(value, types.Integer):
        return lambda value: np.int32(np.int32(value) << np.int32(16)).view(np.float32)
    return lambda value: value


# --- selection -------------------------------------------------------------------------------------------------------
# A key orders candidates by value, then by lower index: value bits, monotone as unsigned integers, above ~index.


@register_jitable
def _key(value, index):
    if value != value:
        high = np.uint64(0xFFFFFFFF)  # NaN comes first, as in torch.topk, so that it reaches the loss
    else:
        bits = np.int64(np.float32(value + np.float32(0.0)).view(np.int32))  # -0.0 equals 0.0
        high = np.uint64(bits ^ 0x80000000 if bits >= 0 else ~bits) & np.uint64(0xFFFFFFFF)
    return (high << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - np.uint64(index))


@register_jitable
def _partition_largest(keys, count, k):
    """Reorder keys[:count], all different, so that the k largest come first (quickselect)."""
    low, high = 0, count - 1
    while low < high:
        a, b, c = keys[low], keys[(low + high) >> 1], keys[high]
        pivot = max(min(a, b), min(max(a, b), c))
        i, j = low, high
        while i <= j:
            while keys[i] > pivot:
                i += 1
            while keys[j] < pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            return


@register_jitable
def _sort_descending(keys, count, scratch):
    """Sort keys[:count], all different. A few: a key's place is the number of larger keys, counted in vector lanes.
    Many: radix sort by bytes, in which bytes that are all equal cost one pass less."""
    if count <= SHORT:
        for i in range(count):
            key, place = keys[i], 0
            for j in range(count):
                place += 1 if keys[j] > key else 0
            scratch[place] = key
        keys[:count] = scratch[:count]
        return
    for shift in range(0, 64, 8):
        starts = np.zeros(257, np.int64)
        for i in range(count):
            starts[256 - ((keys[i] >> np.uint64(shift)) & np.uint64(255))] += 1
        if starts[256 - ((keys[0] >> np.uint64(shift)) & np.uint64(255))] == count:
            continue
        total = 0
        for byte in range(257):
            here = starts[byte]
            starts[byte] = total
            total += here
        for i in range(count):
            byte = 256 - ((keys[i] >> np.uint64(shift)) & np.uint64(255))
            scratch[starts[byte]] = keys[i]
            starts[byte] += 1
        keys[:count] = scratch[:count]


@register_jitable
def _lane_maxima(row, bias, lanes, maxima):
    """maxima[i] = max over s of row[i + s·lanes] + bias[i + s·lanes]. Returns 0, or NaN when a value is not finite."""
    width = row.shape[0]
    wrong = np.float32(0.0)
    for i in range(lanes):
        value = _widen(row[i]) + bias[i]
        maxima[i] = value
        wrong += value - value
    base = lanes
    while base + 2 * lanes <= width:
        for i in range(lanes):
            one = _widen(row[base + i]) + bias[base + i]
            two = _widen(row[base + lanes + i]) + bias[base + lanes + i]
            wrong += (one - one) + (two - two)
            one = one if one > two else two
            maxima[i] = one if one > maxima[i] else maxima[i]
        base += 2 * lanes
    while base < width:
        for i in range(min(lanes, width - base)):
            value = _widen(row[base + i]) + bias[base + i]
            wrong += value - value
            maxima[i] = value if value > maxima[i] else maxima[i]
        base += lanes
    return wrong


@register_jitable
def _threshold(maxima, lanes, k):
    """A number that at least k of maxima[:lanes] reach, and not many more: bisection on the value."""
    low, high = maxima[0], maxima[0]
    for i in range(lanes):
        low = maxima[i] if maxima[i] < low else low
        high = maxima[i] if maxima[i] > high else high
    slack = np.float32(k + max(2, k >> 2))
    for _ in range(24):
        middle = np.float32(0.5) * low + np.float32(0.5) * high
        if not (middle > low and middle < high):
            break
        reach = np.float32(0.0)
        for i in range(lanes):
            reach += np.float32(1.0) if maxima[i] >= middle else np.float32(0.0)
        if reach >= k:
            low = middle
            if reach <= slack:
                break
        else:
            high = middle
    return low


@compiled
def topk(tile, bias, k, lanes, first_row, values, index):
    """Exact top-k of each row of tile + bias: (rows, width) → values, index (rows, k) by value descending, then index
    ascending; `first_row` is added to the indices. k ≤ lanes ≤ width < 2³², or lanes = width.

    The k-th largest of the lane maxima bounds the k-th largest value from below, so only lanes whose maximum reaches
    it are read a second time.
    """
    rows, width = tile.shape
    maxima, reached = np.empty(lanes, np.float32), np.empty(lanes + 1, np.int32)
    # one place more than needed: candidates are written first and counted afterwards, which spares a branch
    keys, scratch, candidates = np.empty(width, np.uint64), np.empty(width, np.uint64), np.empty(width + 1, np.int32)
    for t in range(rows):
        row = tile[t]
        count = 0
        if _lane_maxima(row, bias, lanes, maxima) == np.float32(0.0):
            threshold = _threshold(maxima, lanes, k)
            reaching = 0
            for i in range(lanes):
                reached[reaching] = i
                reaching += 1 if maxima[i] >= threshold else 0
            for lane in range(reaching):
                for j in range(reached[lane], width, lanes):
                    candidates[count] = j
                    count += 1 if _widen(row[j]) + bias[j] >= threshold else 0
        else:
            for j in range(width):
                candidates[j] = j
            count = width
        for place in range(count):
            j = candidates[place]
            keys[place] = _key(_widen(row[j]) + bias[j], j)
        if count > 2 * k:
            _partition_largest(keys, count, k)
            count = k
        _sort_descending(keys, count, scratch)
        for place in range(k):
            j = np.int64(np.uint64(0xFFFFFFFF) - (keys[place] & np.uint64(0xFFFFFFFF)))
            values[t, place] = _widen(row[j]) + bias[j]
            index[t, place] = first_row + j


# --- sparse products -------------------------------------------------------------------------------------------------


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
    """out[t − first_token, index[t, j] − first_row] += values[t, j], on zeros: padding adds 0 to the first row."""
    for t in range(begin, end):
        row = out[t - first_token]
        row[:] = np.float32(0.0)
        for j in range(values.shape[1]):
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


# --- update ----------------------------------------------------------------------------------------------------------


@register_jitable
def _remove_parallel(row, grad):
    dot = np.float32(0.0)
    for i in range(row.shape[0]):
        dot += row[i] * grad[i]
    for i in range(row.shape[0]):
        grad[i] -= dot * row[i]


@compiled
def project(begin, end, param, grad):
    """Remove from each row of grad its component parallel to the unit row of param."""
    for r in range(begin, end):
        _remove_parallel(param[r], grad[r])


@compiled
def adam(begin, end, param, grad, mean, square, ok, scale, numbers, project_rows, unit_rows, copy):
    """One Adam update of these rows; `numbers` = (rate of mean, rate of square, 1/(1 − β₂ᵗ), ε, lr/(1 − β₁ᵗ)).

    Projection changes `grad` in place. `copy`: bfloat16 bits to refresh, or of length 0. Nothing changes unless ok.
    """
    if not ok[0]:
        return
    rate_mean, rate_square, inverse, eps, lr = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
    factor = scale[0]
    for r in range(begin, end):
        row, g, m, s = param[r], grad[r], mean[r], square[r]
        if project_rows:
            _remove_parallel(row, g)
        norm = np.float32(0.0)
        for i in range(row.shape[0]):
            gradient = factor * g[i]
            m[i] += rate_mean * (gradient - m[i])
            s[i] += rate_square * (gradient * gradient - s[i])
            row[i] -= lr * (m[i] / (np.sqrt(s[i] * inverse) + eps))
            norm += row[i] * row[i]
        if unit_rows:
            norm = np.sqrt(norm)
            for i in range(row.shape[0]):
                row[i] /= norm
        if copy.shape[0]:
            for i in range(row.shape[0]):
                bits = np.float32(row[i]).view(np.int32)
                rounded = (bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
                copy[r, i] = np.int16(rounded) if row[i] == row[i] else np.int16(0x7FC0)
