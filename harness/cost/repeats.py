"""How often a run reads each row of its store: a budget above the rows of the store trains on the same rows again."""

from __future__ import annotations

from collections.abc import Iterable

from harness.record.run import Run
from harness.terminal import si


def repeats(run: Run) -> float | None:
    """Times that each row is read, by the rows that were asked for; 1 at least. None while the budget is unknown."""
    if run.config.activations.kind == "synthetic":
        return 1.0  # its rows never end
    return None if run.tokens is None else max(1.0, run.tokens / round(run.config.activations.tokens))


def repeats_line(times: Iterable[float | None], runs: str = "cells") -> list[str]:
    """A line about those of the runs that read a row more than once; empty if none does."""
    many = sorted(number for number in times if number is not None and number > 1)
    if not many:
        return []
    least, most = (f"{number:.3g}" if number < 1000 else si(number) for number in (many[0], many[-1]))
    often = most if least == most else f"{least} to {most}"
    return [f"each row of the store {often} times, in {len(many)} {runs}: train.tokens exceeds the rows of the store"]
