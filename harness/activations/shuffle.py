"""Pseudo-random permutations that are computed, not stored: element i of 0 … n−1 goes to `permute(i)`.

The result is the same on every machine and needs no table. It gives the store its global shuffle and every later epoch
its order. Construction: a Feistel network over the smallest even number of bits that holds n, with cycle walking (apply
it again while the result is not below n), which keeps it a bijection: Black & Rogaway 2002, "Ciphers with arbitrary
finite domains".
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int, UInt

ROUNDS = 6


def digest64(*parts: object) -> int:
    """A 64-bit hash of all parts, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def permute(index: Int[np.ndarray, " m"], n: int, *key: object) -> Int[np.ndarray, " m"]:
    """Images of `index` (each in 0 … n−1) under the permutation of 0 … n−1 that `key` selects."""
    assert n >= 1
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(digest64("feistel", number, *key)) for number in range(ROUNDS)]
    moved = _feistel(index.astype(np.uint64), np.uint64(half), round_keys)
    while (outside := np.flatnonzero(moved >= n)).size:
        moved[outside] = _feistel(moved[outside], np.uint64(half), round_keys)
    return moved.astype(np.int64)


def permutation(n: int, *key: object) -> Int[np.ndarray, " n"]:
    """The whole permutation: element i is the image of i."""
    return permute(np.arange(n, dtype=np.int64), n, *key)


def _feistel(value: UInt[np.ndarray, " m"], half: np.uint64, round_keys: list[np.uint64]) -> UInt[np.ndarray, " m"]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(value: UInt[np.ndarray, " m"]) -> UInt[np.ndarray, " m"]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014), modulo 2⁶⁴."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
