"""Entry point of `python -m harness.bench`. Exit codes: 0 done, 2 a wrong request, 75 interrupted."""

from __future__ import annotations

from harness.errors import INTERRUPTED
from harness.process.signals import interrupt_on_signals
from harness.terminal import run_command, say


def run() -> int:
    """The command; Ctrl-C and SIGTERM end it with one line, also while libraries load."""
    interrupt_on_signals()
    try:
        from harness.bench.command import main  # torch takes seconds to load

        return main()
    except KeyboardInterrupt:
        say("interrupted; no file was written")
        return INTERRUPTED


if __name__ == "__main__":
    run_command(run)
