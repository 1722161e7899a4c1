"""Everything printed for a person: messages, tables, numbers in few characters, and the progress of a run.

`rich` is imported only where something is drawn on a terminal, so that importing this module costs nothing.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from harness.errors import WRONG_REQUEST

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

PLAIN_INTERVAL_S = 10.0
"""Seconds between two progress lines where there is no terminal."""

REDRAW_INTERVAL_S = 0.1
"""Seconds between two drawings of the bar."""

BAR_WIDTHS = (8, 40)
"""The least and the most characters of the bar."""

GAP = 2
"""Blanks after each column of a table."""

MOST_FITTED_ROWS = 500
"""Longer tables are printed plain, in full width: `rich` lays out only a few hundred rows a second."""

STATUS_STYLES = {
    "done": "green",
    "running": "cyan",
    "diverged": "magenta",
    "failed": "red",
    "preempted": "yellow",
    "interrupted": "yellow",
}
"""Status word -> its colour on a terminal."""

_PROGRESS_FIELDS = {"loss": ("loss", ".4g"), "fvu": ("fvu", ".4f"), "dead_frac": ("dead", ".1%")}
"""Field of a metrics line -> its label and format in the progress."""


def say(line: str) -> None:
    """Print one line to standard error at once."""
    with survives_hangup(sys.stderr):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def survives_hangup(stream: TextIO) -> Iterator[None]:
    """Inside, a terminal that was closed is no error: what is written to `stream` goes nowhere from then on.

    Its SIGHUP asks the training to save and stop; an error of a progress line must not come before it.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run the `main` of a command and exit with its code.

    If nobody reads its output any more (`| head`), it ends silently with the code that a shell gives for SIGPIPE. A
    file that it may not read or write is a wrong request. Ctrl-C ends it without a traceback.
    """
    try:
        try:
            code = main()
        finally:
            print(end="", flush=True)
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if stream and _reader_has_gone(stream)]
        if not closed:
            raise  # it was another pipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in closed:  # Python flushes them once more at its end
            os.dup2(nowhere, stream.fileno())
        code = 128 + signal.SIGPIPE
    except PermissionError as error:
        if error.filename is None:
            raise
        say(f"error: {error.filename}: {error.strerror}; its owner can allow it, or use a copy of your own")
        code = WRONG_REQUEST
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)


def _reader_has_gone(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def can_redraw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal with a cursor that can be moved."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str] = (),
    optional: Sequence[str] = (),
    stream: TextIO | None = None,
) -> str:
    """A table as text for `stream` (default: standard output), without a final line break.

    The first column and those named in `left` are aligned to the left, the others to the right. In a file or a pipe,
    the table is plain and has its full width. On a terminal, status words have colours (unless NO_COLOR is set) and the
    table fits the width: columns in `optional` are dropped, empty ones first and then in the order given; if that is
    not enough, the first column is shortened.
    """
    target = stream or sys.stdout
    columns = [(heading, [row[i] for row in rows]) for i, heading in enumerate(headings)]
    if not target.isatty() or len(rows) > MOST_FITTED_ROWS:
        return _plain_table(columns, left)
    console = _console(target)
    columns = _fitting(columns, optional, console.width)
    return _drawn_table(columns, left, console)


def _width(column: tuple[str, list[str]]) -> int:
    heading, cells = column
    return max(map(len, [heading, *cells]))


def _plain_table(columns: Sequence[tuple[str, list[str]]], left: Collection[str]) -> str:
    padded = []
    for i, (heading, cells) in enumerate(columns):
        pad = str.ljust if i == 0 or heading in left else str.rjust
        width = _width((heading, cells))
        padded.append([pad(text, width) for text in (heading, *cells)])
    return "\n".join((" " * GAP).join(line).rstrip() for line in zip(*padded, strict=True))


def _fitting(
    columns: Sequence[tuple[str, list[str]]], optional: Sequence[str], width: int
) -> list[tuple[str, list[str]]]:
    """The columns without those that must be dropped to make the table at most `width` wide."""
    kept = list(columns)
    cells = dict(columns)
    for heading in sorted(optional, key=lambda name: any(text not in ("", "-") for text in cells.get(name, ()))):
        if sum(_width(column) + GAP for column in kept) <= width:
            break
        kept = [column for column in kept if column[0] != heading]
    return kept


def _drawn_table(columns: Sequence[tuple[str, list[str]]], left: Collection[str], console: Console) -> str:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="")
    room = console.width - GAP - sum(_width(column) + GAP for column in columns[1:])
    for i, column in enumerate(columns):
        width = _width(column)
        drawn.add_column(
            column[0],
            justify="left" if i == 0 or column[0] in left else "right",
            no_wrap=True,
            width=min(width, max(len(column[0]), room)) if i == 0 else width,
        )
    for first, *rest in zip(*(cells for _, cells in columns), strict=True):
        drawn.add_row(Text(first), *(Text(text, style=STATUS_STYLES.get(text, "")) for text in rest))
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


@contextmanager
def own_screen(stream: TextIO) -> Iterator[Callable[[str], None]]:
    """A second screen on the terminal `stream`; the first one comes back at the end.

    Yields a function that shows a text, which may have colours, in place of the one before. Lines are cut at the width
    of the terminal, and the text at its height.
    """
    from rich.live import Live
    from rich.text import Text

    with Live(console=_console(stream), screen=True, auto_refresh=False) as live:

        def show(text: str) -> None:
            live.update(Text.from_ansi(text, no_wrap=True, overflow="ellipsis"), refresh=True)

        yield show


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, force_terminal=True, force_jupyter=False, highlight=False, markup=False, emoji=False)


class Progress:
    """The progress of one run at a time: loss, fvu, dead share, tokens/s, time left.

    A terminal gets a bar that is redrawn, any other stream at most one line per ten seconds.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream`: where to write, by default standard error."""
        self._stream = stream or sys.stderr
        self._live: Live | None = None
        self._fields: dict[str, float] = {}
        self._label = ""
        self._total = self._done = self._begin = 0.0  # tokens
        self._start_time = self._last_shown = 0.0  # seconds

    def start(self, label: str, total_tokens: float, done_tokens: float = 0.0) -> None:
        """Begin a run of `total_tokens`; a resumed run has trained on `done_tokens` already."""
        self._close()
        self._label, self._total, self._fields = label, total_tokens, {}
        self._done = self._begin = done_tokens
        self._start_time = self._last_shown = time.monotonic()
        if can_redraw(self._stream):
            self._live = self._new_live()
            self._live.start(refresh=True)
            # a process that is killed would leave the terminal without a cursor
            self._live.console.show_cursor(True)

    def update(self, tokens: float, fields: Mapping[str, Any]) -> None:
        """Show that the run has trained on `tokens` so far; `fields` is a line of its metrics."""
        self._done = tokens
        self._fields |= {name: float(fields[name]) for name in _PROGRESS_FIELDS if fields.get(name) is not None}
        interval = PLAIN_INTERVAL_S if self._live is None else REDRAW_INTERVAL_S
        if time.monotonic() - self._last_shown < interval:
            return
        self._last_shown = time.monotonic()
        if self._live is None:
            self._print(f"{self._label}: {self._numbers()}")
        else:
            with survives_hangup(self._stream):
                self._live.refresh()

    def finish(self, line: str) -> None:
        """End the run: remove the bar and print `line`, its outcome, unless that is empty."""
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

    def _numbers(self) -> str:
        elapsed = time.monotonic() - self._start_time
        rate = (self._done - self._begin) / elapsed if elapsed > 0 else 0.0
        share = self._done / self._total if self._total else 0.0
        left = f", {duration((self._total - self._done) / rate)} left" if rate > 0 else ""
        shown = [f"{share:.0%}"]
        for name, value in self._fields.items():
            label, spec = _PROGRESS_FIELDS[name]
            shown.append(f"{label} {value:{spec}}")
        return f"{' '.join(shown)} {rate:,.0f} tok/s{left}"

    def _print(self, line: str) -> None:
        with survives_hangup(self._stream):
            print(line, file=self._stream, flush=True)

    def _new_live(self) -> Live:
        """The line with the bar; it is redrawn on request, by no thread of its own."""
        from rich.live import Live

        console = _console(self._stream)
        return Live(
            console=console,
            get_renderable=lambda: self._line(console.width),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _line(self, width: int) -> Table:
        """Label, bar and numbers on a line of `width`; the label is shortened if there is no room."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        numbers = self._numbers()
        room = width - len(numbers) - 2
        bar_width = min(max(room - len(self._label), BAR_WIDTHS[0]), BAR_WIDTHS[1])
        label_width = min(max(room - bar_width, 1), len(self._label))
        line = Table.grid(padding=(0, 1, 0, 0))
        line.add_column(width=label_width, no_wrap=True)
        line.add_column(width=bar_width)
        line.add_column(width=len(numbers), no_wrap=True)
        bar = ProgressBar(self._total, self._done, width=bar_width, style="dim", complete_style="", finished_style="")
        line.add_row(self._label, bar, numbers)
        return line


def duration(seconds: float) -> str:
    """A time that is read at a glance: `42s`, `3m05s`, `2h10m`, `12d4h`."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 100 * 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600}h"


def si(value: float) -> str:
    """A count in three digits with a decimal prefix: 3.15M."""
    rounded = float(f"{value:.3g}")
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rounded >= factor:
            return f"{rounded / factor:.3g}{unit}"
    return f"{rounded:.3g}"


def listed(parts: Sequence[str], most: int = 5) -> str:
    """The first `most` entries of a list: `a; b and 7 more`."""
    shown = "; ".join(parts[:most])
    return f"{shown} and {len(parts) - most} more" if len(parts) > most else shown
