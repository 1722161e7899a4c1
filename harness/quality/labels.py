"""Exact labels of tokens by rule: what a probe is asked to find."""

from __future__ import annotations

import keyword
import re
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_KEYWORDS = frozenset(keyword.kwlist)
_QUOTES = "\"'"


def token_labels(ids: Int[Tensor, "contexts length"], tokenizer: Any) -> dict[str, Bool[Tensor, "contexts length"]]:
    """Property → whether each token has it. Of the token's own text, and of the text before it in its context."""
    vocabulary = {token: tokenizer.decode([token]) for token in torch.unique(ids).tolist()}
    rows = [[vocabulary[token] for token in row] for row in ids.tolist()]
    labels = {name: [[rule(text) for text in row] for row in rows] for name, rule in _OF_TOKEN.items()}
    labels |= {name: [rule(row) for row in rows] for name, rule in _OF_CONTEXT.items()}
    return {name: torch.tensor(table) for name, table in labels.items()}


def _previous(row: list[str], found: re.Pattern[str]) -> list[bool]:
    return [False, *(found.search(text) is not None for text in row[:-1])]


def _inside(row: list[str], opening: str, closing: str) -> list[bool]:
    """Whether a bracket is open at the end of each token."""
    depth, inside = 0, []
    for text in row:
        for mark in text:
            depth = max(0, depth + (mark == opening) - (mark == closing))
        inside.append(depth > 0)
    return inside


def _in_quotes(row: list[str]) -> list[bool]:
    mark, inside = "", []
    for text in row:
        for character in text:
            if character in _QUOTES and (not mark or mark == character):
                mark = "" if mark else character
            elif character == "\n":
                mark = ""
        inside.append(bool(mark))
    return inside


def _in_comment(row: list[str]) -> list[bool]:
    """Whether a # came before on the line."""
    comment, inside = False, []
    for text in row:
        for character in text:
            comment = character != "\n" and (comment or character == "#")
        inside.append(comment)
    return inside


_OF_TOKEN = {
    "digit": lambda text: any(mark.isdigit() for mark in text),
    "capitalised": lambda text: text.strip()[:1].isupper(),
    "upper case": lambda text: len(text.strip()) > 1 and text.strip().isupper(),
    "begins a word": lambda text: text.startswith(" ") and text.strip()[:1].isalpha(),
    "first letter a to m": lambda text: text.strip()[:1].lower() in tuple("abcdefghijklm"),
    "code keyword": lambda text: text.strip() in _KEYWORDS,
    "ends in ing": lambda text: text.endswith("ing"),
    "ends in ed": lambda text: text.endswith("ed"),
    "ends in s": lambda text: text.endswith("s"),
    "punctuation": lambda text: bool(text.strip()) and not any(mark.isalnum() for mark in text),
    "line break": lambda text: "\n" in text,
    "white space": lambda text: not text.strip(),
    "long": lambda text: len(text) >= 8,
}
_OF_CONTEXT = {
    "after a line break": lambda row: _previous(row, re.compile(r"\n")),
    "after a dot": lambda row: _previous(row, re.compile(r"\.$")),
    "in parentheses": lambda row: _inside(row, "(", ")"),
    "in quotes": _in_quotes,
    "in a comment": _in_comment,
}
