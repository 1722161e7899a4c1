"""What mirrors tell a person."""

from __future__ import annotations

from harness.terminal import say

_said: set[str] = set()


def say_once(kind: str, line: str) -> None:
    """Print a line to stderr, once per kind: a sweep of a thousand runs has one network."""
    if kind not in _said:
        _said.add(kind)
        say(line)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
