"""Token patterns with wildcards: what an explanation of the n-gram kind is (after Foote et al., N2G).

A pattern says which tokens end at the position where a latent is active; a wildcard stands for any token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LONGEST = 16
"""Tokens of a pattern; what depends on earlier ones is not explained."""
SHARE = 0.5
"""Of the activation that a shorter or masked text must keep."""
WILDCARD = -1


class Pattern(NamedTuple):
    tokens: tuple[int, ...]
    """Token ids, the last at the position of the activation; `WILDCARD` for any token."""
    start: bool
    """Whether the pattern begins where the text begins."""
    activation: float

    @property
    def literal(self) -> int:
        """Tokens that are no wildcards."""
        return sum(token != WILDCARD for token in self.tokens)


Activate = Callable[[Sequence[Sequence[int]]], list[float]]
"""Texts, each of token ids → the activation of the latent at the last token of each. What stands in front of every text
(a fixed first token, because position 0 is special in most models) is the caller's business."""


def build(prefix: Sequence[int], activation: float, activate: Activate, filler: int) -> Pattern:
    """The pattern of one activation at the last token of `prefix`.

    (1) The shortest suffix that keeps `SHARE` of the activation. (2) If `filler` tokens in front of it make that
    vanish, the pattern is bound to the beginning of the text. (3) Each token whose replacement by `filler` keeps it
    becomes a wildcard.
    """
    suffixes = [tuple(prefix[-length:]) for length in range(1, min(len(prefix), LONGEST) + 1)]
    kept = [value >= SHARE * activation for value in activate(suffixes)]
    suffix = suffixes[kept.index(True)] if True in kept else suffixes[-1]
    masked = [(*suffix[:place], filler, *suffix[place + 1 :]) for place in range(len(suffix))]
    own, padded, *values = activate([suffix, (filler, *suffix), *masked])
    needed = [value < SHARE * own or own <= 0 for value in values]
    tokens = tuple(token if need else WILDCARD for token, need in zip(suffix, needed, strict=True))
    start = len(suffix) == len(prefix) and padded < SHARE * own
    while len(tokens) > 1 and tokens[0] == WILDCARD and not start:  # wildcards in front say nothing
        tokens = tokens[1:]
    return Pattern(tokens, start, own)


def simulate(
    patterns: Sequence[Pattern], ids: Int[Tensor, "contexts length"], first: int
) -> Float[Tensor, "contexts length"]:
    """The activation that patterns predict at each position: that of the match with the most literal tokens, then the
    longest. `first` is where texts begin in a context (1 if position 0 is a fixed token)."""
    predicted = torch.zeros(ids.shape)
    ranked = sorted(set(patterns), key=lambda each: (each.literal, len(each.tokens), each.activation))
    for pattern in ranked:  # better ones overwrite
        predicted = predicted.masked_fill(matches(pattern, ids, first), pattern.activation)
    return predicted


def matches(pattern: Pattern, ids: Int[Tensor, "contexts length"], first: int) -> Tensor:
    """Whether the pattern ends at each position."""
    length = ids.shape[1]
    found = torch.zeros(ids.shape, dtype=torch.bool)
    size = len(pattern.tokens)
    if size > length:
        return found
    here = torch.ones(ids.shape[0], length - size + 1, dtype=torch.bool)
    for place, token in enumerate(pattern.tokens):
        if token != WILDCARD:
            here &= ids[:, place : place + length - size + 1] == token
    if pattern.start:
        only = torch.zeros_like(here)
        only[:, first : first + 1] = True
        here &= only
    found[:, size - 1 :] = here
    return found


def words(pattern: Pattern, decode: Callable[[int], str]) -> str:
    """The pattern as text; `*` is a wildcard, `^` the beginning of the text."""
    return ("^" if pattern.start else "") + "".join("*" if t == WILDCARD else decode(t) for t in pattern.tokens)
