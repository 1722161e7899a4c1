"""Loops of selection. See `compile` for what holds for all loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from harness.ops.cpu.compile import Floats, Ints, Keys, Longs, Shorts, compiled

SHORT = 128
"""Up to this many keys are sorted by counting."""

BISECTIONS = 24
"""Steps of the search for a threshold, at most; the significand of float32 has 24 bits."""


def _widen(value: Any) -> Any:
    """A float32 from a stored number: itself, or the bfloat16 with these 16 bits."""
    raise NotImplementedError("only compiled code calls it, where Numba puts `_widen_compiled` in its place")


@overload(_widen, inline="always")
def _widen_compiled(value: Any) -> Callable[[Any], Any]:
    def from_bits(value: Any) -> Any:
        return np.int32(np.int32(value) << np.int32(16)).view(np.float32)

    def same(value: Any) -> Any:
        return value

    return from_bits if isinstance(value, types.Integer) else same


# A key orders candidates by value, then by lower index: value bits, monotone as unsigned integers, above ~index.


@register_jitable
def _key(value: Any, index: int) -> np.uint64:
    if value != value:
        high = np.uint64(0xFFFFFFFF)  # NaN comes first, as in torch.topk, so that it reaches the loss
    else:
        bits = np.int64(np.float32(value + np.float32(0.0)).view(np.int32))  # -0.0 equals 0.0
        high = np.uint64(bits ^ 0x80000000 if bits >= 0 else ~bits) & np.uint64(0xFFFFFFFF)
    return (high << np.uint64(32)) | (np.uint64(0xFFFFFFFF) - np.uint64(index))


@register_jitable
def _partition_largest(keys: Keys, count: int, k: int) -> None:
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
def _sort_descending(keys: Keys, count: int, scratch: Keys) -> None:
    """Sort keys[:count], all different. With few keys, a key's place is the number of larger keys, counted in vector
    lanes. With many, radix sort by bytes; a byte that is equal in all keys costs no pass."""
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
def _lane_maxima(row: Floats | Shorts, bias: Floats, lanes: int, maxima: Floats) -> np.float32:
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
def _threshold(maxima: Floats, lanes: int, k: int) -> np.float32:
    """A number that at least k of maxima[:lanes] reach, and not many more: bisection on the value."""
    low, high = maxima[0], maxima[0]
    for i in range(lanes):
        low = maxima[i] if maxima[i] < low else low
        high = maxima[i] if maxima[i] > high else high
    slack = np.float32(k + max(2, k >> 2))
    for _ in range(BISECTIONS):
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
def topk(
    tile: Floats | Shorts,
    bias: Floats,
    k: int,
    lanes: int,
    first_row: int,
    values: Floats,
    index: Longs,
    subset: Longs,
    columns: Floats,
) -> None:
    """Exact top-k of each row of tile + bias: (rows, width) → values, index (rows, k) by value descending, then index
    ascending; `first_row` is added to the indices. k ≤ lanes ≤ width < 2³², or lanes = width.

    Copies the columns `subset` of the tile to `columns` (rows, subset), without bias, while a row is in cache.

    The k-th largest of the lane maxima bounds the k-th largest value from below, so only lanes whose maximum reaches
    it are read a second time.
    """
    rows, width = tile.shape
    maxima, reached = np.empty(lanes, np.float32), np.empty(lanes + 1, np.int32)
    # one place more than needed: a candidate is written first and counted afterwards, which saves a branch
    keys, scratch, candidates = np.empty(width, np.uint64), np.empty(width, np.uint64), np.empty(width + 1, np.int32)
    for t in range(rows):
        row = tile[t]
        count = 0
        finite = _lane_maxima(row, bias, lanes, maxima) == np.float32(0.0)
        for i in range(subset.shape[0]):
            columns[t, i] = _widen(row[subset[i]])
        if finite:
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


@register_jitable
def _ordered_bits(row: Floats | Shorts, bias: Floats, bits: Ints) -> None:
    """bits[i]: the bits of row[i] + bias[i], which order as the numbers do; 0 unless positive; most for NaN."""
    for i in range(row.shape[0]):
        value = np.float32(_widen(row[i]) + bias[i])
        pattern = value.view(np.int32)
        pattern = pattern if value > 0 else np.int32(0)
        bits[i] = pattern if value == value else np.int32(0x7FFFFFFF)


@register_jitable
def _reaching(bits: Ints, threshold: np.int32) -> np.int64:
    """How many of `bits` reach the threshold; fewer than 2²⁴."""
    count = np.float32(0.0)
    for i in range(bits.shape[0]):
        count += np.float32(1.0) if bits[i] >= threshold else np.float32(0.0)
    return np.int64(count)


@register_jitable
def _kth_positive(bits: Ints, k: int) -> tuple[np.int32, np.int64]:
    """The k-th largest of `bits`, or 1, the least of a positive number, if fewer are positive; and how many of those
    equal to it are among the k largest. Bisection on the bits ends at the number exactly."""
    low, reach_low = np.int64(1), _reaching(bits, np.int32(1))
    high, reach_high = np.int64(1 << 31), np.int64(0)
    # more than k values reach `low`, fewer than k reach `high`
    while reach_low > k and high - low > 1:
        middle = (low + high) >> 1
        reach = _reaching(bits, np.int32(middle))
        if reach >= k:
            low, reach_low = middle, reach
        else:
            high, reach_high = middle, reach
    return np.int32(low), np.int64(bits.shape[0]) if reach_low <= k else k - reach_high


@compiled
def positive_topk(tile: Floats | Shorts, bias: Floats, k: int, first_row: int, values: Floats, index: Longs) -> None:
    """The positive ones among the k largest of each row of tile + bias (rows, width), by ascending index, equal values
    at the k-th place to the lowest; the rest of values, index (rows, k) is 0 at `first_row`. NaN counts as largest."""
    rows, width = tile.shape
    # one place more than needed: an index is written first and counted afterwards, which saves a branch
    bits, chosen = np.empty(width, np.int32), np.empty(width + 1, np.int32)
    for t in range(rows):
        row, count = tile[t], 0
        _ordered_bits(row, bias, bits)
        threshold, spare = _kth_positive(bits, k)
        for i in range(width):
            chosen[count] = i
            equal = 1 if bits[i] == threshold and spare > 0 else 0
            spare -= equal
            count += 1 if bits[i] > threshold else equal
        for place in range(count):
            i = chosen[place]
            values[t, place] = _widen(row[i]) + bias[i]
            index[t, place] = first_row + i
        values[t, count:] = np.float32(0.0)
        index[t, count:] = first_row


WORD = 8
"""Neighbouring numbers whose marks are tested as one integer; most have no entry above a threshold."""


@compiled
def gather_above(
    tile: Floats | Shorts,
    bias: Floats,
    theta: Floats,
    most: int,
    first_row: int,
    starts: Longs,
    values: Floats,
    index: Ints,
) -> bool:
    """The numbers of tile + bias that are not below theta, row after row, and their columns plus `first_row`; those of
    row t stand at starts[t] … starts[t + 1]. Ends with False at a row that has more than `most`.

    `values` and `index` need a place more than rows·most + width: a number is written first and counted afterwards.
    """
    rows, width = tile.shape
    words = width // WORD
    marks = np.zeros((words + 1) * WORD, np.int8)
    packed, marked = marks.view(np.int64), np.empty(words + 1, np.int32)
    starts[0] = place = 0
    for t in range(rows):
        row = tile[t]
        for i in range(width):
            marks[i] = np.int8(0) if _widen(row[i]) + bias[i] < theta[i] else np.int8(1)
        count = 0
        for word in range(words):
            marked[count] = word
            count += 1 if packed[word] != 0 else 0
        for at in range(count):
            begin = np.int64(marked[at]) * WORD
            for offset in range(WORD):
                i = begin + offset
                values[place] = _widen(row[i]) + bias[i]
                index[place] = first_row + i
                place += np.int64(marks[i])
        for i in range(words * WORD, width):
            values[place] = _widen(row[i]) + bias[i]
            index[place] = first_row + i
            place += np.int64(marks[i])
        if place - starts[t] > most:
            return False
        starts[t + 1] = place
    return True


@compiled
def mask_below(tile: Floats | Shorts, bias: Floats, theta: Floats, out: Floats) -> None:
    """out = tile + bias, −inf where that is below theta."""
    rows, width = tile.shape
    for t in range(rows):
        row, result = tile[t], out[t]
        for i in range(width):
            value = _widen(row[i]) + bias[i]
            result[i] = np.float32(-np.inf) if value < theta[i] else value


@compiled
def spread_rows(begin: int, end: int, starts: Longs, values: Floats, index: Ints, first_row: int, out: Floats) -> None:
    """out[t, index − first_row] = the values of row t, as `gather_above` found them; −inf elsewhere."""
    for t in range(begin, end):
        out[t, :] = np.float32(-np.inf)
        for place in range(starts[t - begin], starts[t - begin + 1]):
            out[t, index[place] - first_row] = values[place]


@compiled
def pad_rows(
    begin: int, end: int, starts: Longs, flat_values: Floats, flat_index: Ints, values: Floats, index: Longs
) -> None:
    """Row t of values and index (rows, capacity) gets the entries starts[t − begin] … of the flat lists; the rest of
    the row stays."""
    for t in range(begin, end):
        first = starts[t - begin]
        for place in range(starts[t - begin + 1] - first):
            values[t, place] = flat_values[first + place]
            index[t, place] = flat_index[first + place]


@compiled
def keep_positive_topk(values: Floats, bias: Floats, k: int) -> None:
    """Add `bias` to each row of `values` (rows, width), in place, and keep what `positive_topk` finds; else 0."""
    rows, width = values.shape
    bits = np.empty(width, np.int32)
    for t in range(rows):
        row = values[t]
        _ordered_bits(row, bias, bits)
        threshold, spare = np.int32(1), width
        if k < width:
            threshold, spare = _kth_positive(bits, k)
        if spare >= width:
            for i in range(width):
                row[i] = row[i] + bias[i] if bits[i] >= threshold else np.float32(0.0)
            continue
        for i in range(width):
            equal = 1 if bits[i] == threshold and spare > 0 else 0
            spare -= equal
            row[i] = row[i] + bias[i] if bits[i] > threshold or equal == 1 else np.float32(0.0)
