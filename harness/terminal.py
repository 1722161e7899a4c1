"""What a person sees while a run trains: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm

PLAIN_INTERVAL_S = 10.0

_SHOWN = {"loss": ".4g", "fvu": ".4f", "dead_frac": ".1%"}
_NAMES = {"dead_frac": "dead"}


class Progress:
    """One bar per run: loss, fvu, dead share, tokens/s, time left.

    The stream decides how: a terminal gets a bar that is redrawn, anything else at most one line per ten seconds.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._bar: tqdm[Any] | None = None
        self._fields: dict[str, float] = {}
        self._label = ""
        self._total = self._done = self._started_at = self._last_line = 0.0
        self._start_time = 0.0

    def start(self, label: str, total_tokens: float, done_tokens: float = 0.0) -> None:
        """Begin a run of `total_tokens` of which `done_tokens` are done already (after a resume)."""
        self._label, self._total, self._fields = label, total_tokens, {}
        self._done = self._started_at = done_tokens
        self._start_time = self._last_line = time.monotonic()
        if self._terminal:
            self._bar = tqdm(
                desc=label,
                total=int(total_tokens),
                initial=int(done_tokens),
                unit="tok",
                unit_scale=True,
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )

    def update(self, tokens: float, fields: Mapping[str, Any]) -> None:
        """`tokens` trained so far in all; `fields` is a metrics line, of which the known names are shown."""
        self._done = tokens
        self._fields |= {name: float(fields[name]) for name in _SHOWN if fields.get(name) is not None}
        if self._bar is not None:
            self._bar.set_postfix_str(self._shown(), refresh=False)
            self._bar.update(int(tokens) - self._bar.n)
        elif not self._terminal and time.monotonic() - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            self._print(f"{self._label}: {self._plain()}")

    def finish(self, line: str) -> None:
        """End the run; `line` is its outcome and stays on the screen (nothing is printed when it is empty)."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if line:
            self._print(line)

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.clear()
        self._print(line)
        if self._bar is not None:
            self._bar.refresh()

    def _shown(self) -> str:
        return " ".join(f"{_NAMES.get(name, name)} {value:{_SHOWN[name]}}" for name, value in self._fields.items())

    def _plain(self) -> str:
        elapsed = time.monotonic() - self._start_time
        rate = (self._done - self._started_at) / elapsed if elapsed > 0 else 0.0
        share = self._done / self._total if self._total else 0.0
        left = f", {duration((self._total - self._done) / rate)} left" if rate > 0 else ""
        return f"{share:.0%} {self._shown()} {rate:,.0f} tok/s{left}"

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A time a person reads at a glance: `42s`, `3m05s`, `2h10m`, `12d4h`."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 100 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded to their widest entry: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def si(value: float) -> str:
    """A count in three digits with a decimal prefix: 3.15M."""
    rounded = float(f"{value:.3g}")
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= factor:
            return f"{rounded / factor:.3g}{unit}"
    return f"{rounded:.3g}"


def listed(parts: Sequence[str], most: int = 5) -> str:
    """The first few of a list that may be long: `a; b and 7 more`."""
    shown = "; ".join(parts[:most])
    return f"{shown} and {len(parts) - most} more" if len(parts) > most else shown


def say(line: str) -> None:
    """One line for the person who started the command, on standard error."""
    print(line, file=sys.stderr, flush=True)
