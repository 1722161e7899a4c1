"""Statistics and examples of single latents, from all of their activations.

A group is a fifth of a latent's positive activations by rank, the weakest first, so groups are of equal size: they are
quantiles of the activations and not intervals of their range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from harness.quality.features.codes import Entries

TOP = 20
"""Contexts with the largest activations, at most one of a document."""
GROUPS, PER_GROUP = 5, 5
SILENT = 5
"""Places in contexts in which the latent is nowhere active."""
EXAMPLES = TOP + GROUPS * PER_GROUP + SILENT
WINDOW = 33
"""Tokens that are shown of a context."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
BINS = 40
"""Of the histogram, from 0 to the largest activation."""
TOP_TOKENS = 5


class Place(NamedTuple):
    """Where the judged tokens stand."""

    flat: Int64[np.ndarray, " tokens"]
    """Position in the flattened contexts, ascending."""
    document: Int64[np.ndarray, " contexts"]
    ids: Int32[np.ndarray, "contexts length"]


def block_columns(entries: Entries, first: int, last: int, places: Place) -> dict[str, np.ndarray]:
    """A row per latent `first` … `last` − 1: numbers, and places of examples (−1: there is none).

    `example_place` holds `TOP` contexts, `PER_GROUP` of each group, `SILENT` negatives; `example_acts` the activations
    in the window around each, in 255ths of the latent's largest, rounded up.
    """
    size, tokens = last - first, len(places.flat)
    width = min(WINDOW, places.ids.shape[1])
    columns: dict[str, np.ndarray] = {
        "count": np.bincount(entries.latent - first, minlength=size),
        "quantiles": np.zeros((size, len(QUANTILES)), np.float32),
        "histogram": np.zeros((size, BINS), np.uint32),
        "example_place": np.full((size, EXAMPLES), -1, np.int64),
        "example_value": np.zeros((size, EXAMPLES), np.float32),
        "example_acts": np.zeros((size, EXAMPLES * width), np.uint8),
        "top_tokens": np.full((size, TOP_TOKENS), -1, np.int32),
    }
    columns |= _moments(entries, first, size, tokens)
    ends = columns["count"].cumsum()
    for row, (begin, end) in enumerate(zip(ends - columns["count"], ends, strict=True)):
        value, place = entries.value[begin:end], places.flat[entries.token[begin:end]]
        generator = np.random.default_rng((0, first + row))
        chosen = np.concatenate([_active_examples(value, place, places, generator), _silent(place, places, generator)])
        columns["example_place"][row] = np.where(chosen >= 0, chosen, -1)
        columns["example_value"][row], acts = _windows(chosen, value, place, places.ids.shape[1], width)
        columns["example_acts"][row] = acts.reshape(-1)
        if not len(value):
            continue
        columns["quantiles"][row] = np.quantile(value, QUANTILES)
        columns["histogram"][row] = np.histogram(value, BINS, (0, float(value.max())))[0]
        found, which = np.unique(places.ids.reshape(-1)[place], return_inverse=True)
        best = np.argsort(-np.bincount(which, value), kind="stable")[:TOP_TOKENS]
        columns["top_tokens"][row, : len(best)] = found[best]
    return columns


def _moments(entries: Entries, first: int, size: int, tokens: int) -> dict[str, np.ndarray]:
    """Over all tokens, those at which the latent is silent included; skewness and kurtosis as Gao et al. state them:
    E a³/(E a²)^1.5 and E a⁴/(E a²)²."""
    value, row = entries.value.astype(np.float64), entries.latent - first
    mean, square, cube, fourth = (np.bincount(row, value**power, size) / tokens for power in (1, 2, 3, 4))
    safe = np.where(square > 0, square, 1)
    largest = np.zeros(size)
    np.maximum.at(largest, row, value)
    return {
        "density": np.bincount(row, minlength=size) / tokens,
        "mean": mean,
        "mean_square": square,
        "skewness": cube / safe**1.5,
        "kurtosis": fourth / safe**2,
        "largest": largest,
    }


def _active_examples(
    value: Float32[np.ndarray, " count"],
    place: Int64[np.ndarray, " count"],
    places: Place,
    generator: np.random.Generator,
) -> Int64[np.ndarray, " examples"]:
    order = np.argsort(-value, kind="stable")
    owner = places.document[place[order] // places.ids.shape[1]]
    best = np.sort(np.unique(owner, return_index=True)[1])[:TOP]
    parts = [_padded(place[order[best]], TOP)]
    for group in np.array_split(order[::-1], GROUPS):
        few = generator.permutation(group)[:PER_GROUP]
        parts.append(_padded(place[few[np.argsort(-value[few], kind="stable")]], PER_GROUP))
    return np.concatenate(parts)


def _silent(
    place: Int64[np.ndarray, " count"], places: Place, generator: np.random.Generator
) -> Int64[np.ndarray, " examples"]:
    length = places.ids.shape[1]
    tried = places.flat[generator.integers(len(places.flat), size=8 * SILENT)]
    tried = tried[~np.isin(tried // length, place // length)]
    apart = np.sort(np.unique(tried // length, return_index=True)[1])
    return _padded(tried[apart][:SILENT], SILENT)


def _padded(found: Int64[np.ndarray, " some"], size: int) -> Int64[np.ndarray, " size"]:
    return np.concatenate([found, np.full(size - len(found), -1, np.int64)])


def window_start(place: Int64[np.ndarray, " examples"], length: int, width: int) -> Int64[np.ndarray, " examples"]:
    """First flat position of the window around each place, inside its context."""
    context, position = np.divmod(place, length)
    return context * length + np.clip(position - width // 2, 0, length - width)


def _windows(
    chosen: Int64[np.ndarray, " examples"],
    value: Float32[np.ndarray, " count"],
    place: Int64[np.ndarray, " count"],
    length: int,
    width: int,
) -> tuple[Float32[np.ndarray, " examples"], UInt8[np.ndarray, "examples width"]]:
    """The activation at each chosen place, and those of its window."""
    if not len(value):
        return np.zeros(len(chosen), np.float32), np.zeros((len(chosen), width), np.uint8)
    spans = window_start(chosen, length, width)[:, None] + np.arange(width)
    near = np.searchsorted(place, spans).clip(max=len(place) - 1)
    hit: Bool[np.ndarray, "examples width"] = (place[near] == spans) & (chosen >= 0)[:, None]
    acts = np.where(hit, np.ceil(value[near] * (255 / value.max())), 0).clip(0, 255)
    own = np.searchsorted(place, chosen).clip(0, len(place) - 1)
    return np.where(place[own] == chosen, value[own], 0), acts.astype(np.uint8)
