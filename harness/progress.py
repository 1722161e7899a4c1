"""What is shown while cells train: how far a run is, which cell of the sweep it is, how long the sweep still takes.

`rich` is imported only where something is drawn on a terminal, so that importing this module costs nothing.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from harness.terminal import can_redraw, console_on, duration, rough_duration, survives_hangup

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

PLAIN_INTERVAL_S = 10.0
"""Seconds between two progress lines where there is no terminal."""

REDRAW_INTERVAL_S = 0.1
"""Seconds between two drawings of the bar."""

BAR_WIDTHS = (8, 40)
"""The least and the most characters of the bar."""

RELAY_FD = "HARNESS_PROGRESS_FD"
"""Environment variable of rank 0: the pipe through which the launcher shows its progress."""

RELAY_TIMEOUT_S = 5.0
"""How long the launcher waits for the last lines: a process that rank 0 has forked may still hold the pipe."""

_FIELDS = {"loss": ("loss", ".4g"), "fvu": ("fvu", ".4f"), "dead_frac": ("dead", ".1%")}
"""Field of a metrics line -> its label and format in the progress."""

_OPTIONAL = ("dead_frac", "loss", "speed", "fvu")
"""Numbers that a narrow terminal does without, from the first on."""

_TRUSTED_SHARE = 0.05
"""From this share of a run on, its own speed says how long the rest takes; before, the plan does."""


class Countdown:
    """Which cells of a sweep are in training and how long all that is left still takes.

    The plan's seconds are corrected by what the jobs so far really took.
    """

    def __init__(self, total: int, ended: int, expected_s: Sequence[float | None]) -> None:
        """`ended` of `total` cells have ended; `expected_s`: seconds of each job that is left, None if unknown."""
        self.total, self.ended = total, ended
        self._cells, self._now_s = 0, None
        self._left = list(expected_s)
        self._planned_s = self._took_s = 0.0  # of the jobs so far
        self._begin = 0.0

    def begin(self, cells: int, expected_s: float | None) -> None:
        """A job of `cells` cells, one of those that were left, trains from now on."""
        if expected_s in self._left:
            self._left.remove(expected_s)
        self._cells, self._now_s, self._begin = cells, expected_s, time.monotonic()

    def end(self) -> None:
        """The job that trained has ended."""
        if self._now_s is not None:
            self._planned_s += self._now_s
            self._took_s += time.monotonic() - self._begin
        self._cells, self._now_s = 0, None

    def count(self, cells: int) -> None:
        """So many more cells have ended. A pack that was begun earlier may have cells that nobody asked for now."""
        self.ended += cells
        self.total = max(self.total, self.ended)

    def left_s(self, share: float = 0.0, own_s: float | None = None) -> float | None:
        """Seconds until all is done; None if unknown. `share` of the present job is done, and by its own speed the rest
        of it takes `own_s`."""
        expected = [self._now_s, *self._left] if self._cells else self._left
        if any(seconds is None for seconds in expected):
            return None
        planned_s, took_s = self._planned_s, self._took_s
        now_s = (self._now_s or 0.0) * (1 - share)
        if own_s is not None:
            planned_s, took_s = planned_s + (self._now_s or 0.0), took_s + time.monotonic() - self._begin + own_s
        factor = took_s / planned_s if planned_s else 1.0
        return (factor * now_s if own_s is None else own_s) + factor * sum(seconds or 0.0 for seconds in self._left)

    def words(self, share: float = 0.0, own_s: float | None = None) -> str:
        """`[7 of 30, 6 min left]`: the cell in training, or the last one that has ended."""
        first, last = self.ended + 1, self.ended + self._cells
        number = f"{first}-{last}" if self._cells > 1 else str(max(last, self.ended))
        left_s = self.left_s(share, own_s)
        more = self._cells or self.ended < self.total
        left = f", {rough_duration(left_s)} left" if left_s is not None and more else ""
        return f"[{number} of {self.total}{left}]"


class Progress:
    """The progress of one job at a time: fvu, loss, dead share, tokens/s, time left.

    A terminal gets a bar that is redrawn, any other stream at most one line per ten seconds.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream`: where to write, by default standard error."""
        self._stream = stream or sys.stderr
        self.countdown: Countdown | None = None
        """Of the sweep; then the time left is that of the sweep."""
        self.names: dict[str, str] = {}
        """Label of a job of the sweep -> what to call it."""
        self._counts = False
        """Whether what is shown now is a job of the sweep."""
        self._live: Live | None = None
        self._fields: dict[str, float] = {}
        self._label = ""
        self._total = self._done = self._begin = 0.0  # tokens
        self._start_time = self._last_shown = 0.0  # seconds

    def start(self, label: str, total_tokens: float, done_tokens: float = 0.0) -> None:
        """Begin a job of `total_tokens`; a resumed one has trained on `done_tokens` already."""
        self._close()
        self._label, self._total, self._fields = self.names.get(label, label), total_tokens, {}
        self._counts = self.countdown is not None and label in self.names
        self._done = self._begin = done_tokens
        self._start_time = self._last_shown = time.monotonic()
        if can_redraw(self._stream):
            self._live = self._new_live()
            self._live.start(refresh=True)
            # a process that is killed would leave the terminal without a cursor
            self._live.console.show_cursor(True)

    def update(self, tokens: float, fields: Mapping[str, Any]) -> None:
        """Show that the job has trained on `tokens` so far; `fields` is a line of its metrics."""
        self._done = tokens
        self._fields |= {name: float(fields[name]) for name in _FIELDS if fields.get(name) is not None}
        interval = PLAIN_INTERVAL_S if self._live is None else REDRAW_INTERVAL_S
        if time.monotonic() - self._last_shown < interval:
            return
        self._last_shown = time.monotonic()
        if self._live is None:
            self._print(f"{self._prefix()}{self._label}: {' '.join(self._numbers().values())}{self._own_left()}")
        else:
            with survives_hangup(self._stream):
                self._live.refresh()

    def finish(self, line: str) -> None:
        """End the job: remove the bar and print `line`, its outcome, unless that is empty."""
        self._close()
        if line:
            self._print(line)

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._live is None:
            self._print(line)
        else:
            with survives_hangup(self._stream):
                self._live.console.print(line, soft_wrap=True)

    def _close(self) -> None:
        if self._live is not None:
            with survives_hangup(self._stream):
                self._live.stop()
            self._live = None

    def _rate(self) -> float:
        """Tokens per second since the start."""
        elapsed = time.monotonic() - self._start_time
        return (self._done - self._begin) / elapsed if elapsed > 0 else 0.0

    def _share(self) -> float:
        return self._done / self._total if self._total else 0.0

    def _rest_s(self) -> float | None:
        """Seconds that the rest of this job takes at its own speed; None before that is known."""
        rate = self._rate()
        return (self._total - self._done) / rate if rate > 0 else None

    def _prefix(self) -> str:
        if self.countdown is None or not self._counts:
            return ""
        known = self._done - self._begin >= _TRUSTED_SHARE * self._total
        return f"{self.countdown.words(self._share(), self._rest_s() if known else None)} "

    def _own_left(self) -> str:
        rest_s = self._rest_s()
        return f", {duration(rest_s)} left" if not self._counts and rest_s is not None else ""

    def _numbers(self) -> dict[str, str]:
        """What is shown of the job, by name."""
        shown = {"share": f"{self._share():.0%}"}
        for name, value in self._fields.items():
            label, spec = _FIELDS[name]
            shown[name] = f"{label} {value:{spec}}"
        return shown | {"speed": f"{self._rate():,.0f} tok/s"}

    def _print(self, line: str) -> None:
        with survives_hangup(self._stream):
            print(line, file=self._stream, flush=True)

    def _new_live(self) -> Live:
        """The line with the bar; it is redrawn on request, by no thread of its own."""
        from rich.live import Live

        console = console_on(self._stream)
        return Live(
            console=console,
            get_renderable=lambda: self._line(console.width),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _line(self, width: int) -> Table:
        """Prefix, label, bar and numbers on a line of `width`. Where there is no room, numbers are left out, the least
        important first; then the label is shortened."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        label, numbers, end = f"{self._prefix()}{self._label}", self._numbers(), self._own_left()
        for name in _OPTIONAL:
            if len(label) + BAR_WIDTHS[0] + len(" ".join(numbers.values()) + end) + 2 <= width:
                break
            numbers.pop(name, None)
        text = " ".join(numbers.values()) + end
        room = width - len(text) - 2
        bar_width = min(max(room - len(label), BAR_WIDTHS[0]), BAR_WIDTHS[1])
        label_width = min(max(room - bar_width, 1), len(label))
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_column(width=label_width, no_wrap=True)
        line.add_column(width=bar_width)
        line.add_column(width=len(text), no_wrap=True)
        bar = ProgressBar(self._total, self._done, width=bar_width, style="dim", complete_style="", finished_style="")
        line.add_row(label, bar, text)
        return line


class Relayed(Progress):
    """Shows nothing here: passes everything to the process that started this one, see `relay`."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        os.set_blocking(descriptor, False)

    def start(self, label: str, total_tokens: float, done_tokens: float = 0.0) -> None:
        self._send("start", label, total_tokens, done_tokens)

    def update(self, tokens: float, fields: Mapping[str, Any]) -> None:
        self._send("update", tokens, {name: fields[name] for name in _FIELDS if fields.get(name) is not None})

    def finish(self, line: str) -> None:
        self._send("finish", line)

    def note(self, line: str) -> None:
        self._send("note", line)

    def _send(self, call: str, *arguments: Any) -> None:
        # training never waits for a reader, and goes on without one
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, (json.dumps([call, *arguments]) + "\n").encode())


def own_progress() -> Progress:
    """The progress of this process: on standard error, or where the process that started this one shows it."""
    return Relayed(int(os.environ[RELAY_FD])) if RELAY_FD in os.environ else Progress()


@contextmanager
def relay(progress: Progress) -> Iterator[int]:
    """Show on `progress` what another process reports.

    Yields the descriptor that it writes to, which it must inherit under the name `RELAY_FD`. The block must not end
    before that process has.
    """
    read_end, write_end = os.pipe()

    def show() -> None:
        with os.fdopen(read_end, encoding="utf-8") as lines:
            for line in lines:
                call, *arguments = json.loads(line)
                getattr(progress, call)(*arguments)

    reader = threading.Thread(target=show, name="progress", daemon=True)
    reader.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        reader.join(timeout=RELAY_TIMEOUT_S)
