"""What mirrors tell a person."""

from __future__ import annotations

from harness.terminal import say

_said: set[str] = set()


def say_once(kind: str, line: str) -> None:
    """Print a line to stderr, once per kind: a sweep of a thousand runs has one network."""
    if kind not in _said:
        _said.add(kind)
        say(line)


def in_one_line(error: Exception) -> str:
    """All that an exception says, so that its advice is not cut off; very long texts lose their middle."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 800 else f"{text[:400]} … {text[-400:]}"
