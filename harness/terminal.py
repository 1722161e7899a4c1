"""Everything printed for a person: messages, tables, numbers and commands in few characters.

`rich` is imported only where something is drawn on a terminal, so that importing this module costs nothing.
"""

from __future__ import annotations

import errno
import os
import select
import shlex
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from harness.errors import WRONG_REQUEST, UserError
from harness.files import NOT_ALLOWED, user_path

if TYPE_CHECKING:
    from rich.console import Console

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


class Parser(ArgumentParser):
    """Reports a wrong request in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_REQUEST, f"{self.prog}: {message} (see {self.prog} --help)\n")


def path_argument(text: str) -> Path:
    """A path of the command line, for `argparse`; `~` and variables are filled in as in every setting."""
    try:
        return Path(user_path(text))
    except UserError as error:
        raise ArgumentTypeError(str(error)) from None


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
        say(f"error: {error.filename}: {error.strerror}; {NOT_ALLOWED}")
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
    console = console_on(target)
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

    with Live(console=console_on(stream), screen=True, auto_refresh=False) as live:

        def show(text: str) -> None:
            live.update(Text.from_ansi(text, no_wrap=True, overflow="ellipsis"), refresh=True)

        yield show


def console_on(stream: TextIO) -> Console:
    """A `rich` console that draws on `stream`."""
    from rich.console import Console

    return Console(file=stream, force_terminal=True, force_jupyter=False, highlight=False, markup=False, emoji=False)


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


def rough_duration(seconds: float) -> str:
    """A time that is only estimated, in words: `40 s`, `9 min`, `2.5 h`, `3.1 days`."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    if seconds < 59.5 * 60:
        return f"{round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.2g} h"
    return f"{seconds / 86400:.2g} days"


def python_command(module: str, *words: str | Path) -> str:
    """`python -m module …` as it can be pasted here: with the interpreter as this process was started with it."""
    python = sys.orig_argv[0] if sys.orig_argv else sys.executable
    return " ".join([shlex.quote(python), "-m", module, *(shown_path(word) for word in words)])


def this_command() -> str:
    """The command of this process, to be typed again."""
    return shlex.join(sys.orig_argv)


def shown_path(path: str | Path) -> str:
    """A path as short as it can be pasted here: relative to the current directory if it lies there, quoted."""
    with suppress(ValueError, OSError):
        path = Path(path).absolute().relative_to(Path.cwd()) if isinstance(path, Path) else path
    return shlex.quote(str(path))


def counted(number: int, noun: str) -> str:
    """`1 cell`, `2 cells`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


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
