"""How far a fit can be trusted, in one word."""

from __future__ import annotations

import enum
from collections.abc import Iterable

from analysis.format import Interval
from analysis.notes import Note, any_error


class Status(enum.StrEnum):
    """How far a fit can be trusted."""

    OK = "ok"
    """Converged, every interval closed."""
    OPEN = "open"
    """Converged, but the data do not bound at least one parameter."""
    UNRELIABLE = "unreliable"
    """A note of severity error: not a converged fit, or a degenerate design."""
    FAILED = "failed"
    """No fit was possible; the notes say why."""

    @property
    def usable(self) -> bool:
        """Whether its numbers may be used."""
        return self in (Status.OK, Status.OPEN)


def status_of(notes: list[Note], intervals: Iterable[Interval]) -> Status:
    """The status of a finished fit."""
    if any_error(notes):
        return Status.UNRELIABLE
    if any(None in interval for interval in intervals):
        return Status.OPEN
    return Status.OK
