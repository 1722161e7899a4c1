"""Which signals ask for a stop, and in which words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from harness.process.signals import StopFlag, stop_on_signals

WORDS = {
    signal.SIGINT: "Ctrl-C",
    signal.SIGTERM: "asked to stop (SIGTERM)",
    signal.SIGUSR1: "asked to stop (SIGUSR1)",
    signal.SIGHUP: "the terminal was closed (SIGHUP)",
}


@pytest.mark.parametrize("number", WORDS)
def test_a_signal_asks_for_a_stop_and_says_why(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert (stop.requested, stop.reason, stop.urgent) == (True, WORDS[number], False)
    assert signal.getsignal(number) == before


def test_the_same_signal_twice_is_urgent_and_another_one_is_not() -> None:
    with stop_on_signals() as stop:
        for number, urgent in ((signal.SIGUSR1, False), (signal.SIGTERM, False), (signal.SIGTERM, True)):
            os.kill(os.getpid(), number)
            assert stop.urgent == urgent
        assert stop.reason == WORDS[signal.SIGUSR1]  # the first


def test_a_hangup_stays_ignored_where_it_was_as_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_deadline_says_so() -> None:
    stop = StopFlag(deadline=time.time() + 5)
    stop.look_at_deadline(save_s=1.0)
    assert (stop.requested, stop.reason, stop.urgent) == (True, "time limit", False)


HUNG_UP = """
import os, signal, sys, time
from harness.process.signals import stop_on_signals
from harness.progress import Progress
from harness.terminal import say
with stop_on_signals() as stop:
    progress = Progress()
    progress.start("a run", 100.0)
    os.write(int(sys.argv[1]), b"r")
    time.sleep(float(sys.argv[2]))  # the terminal goes meanwhile
    for tokens in range(3):
        time.sleep(0.15)
        progress.update(tokens, {"loss": 1.0})
    progress.finish("the outcome")
    say("a line")
    os.write(int(sys.argv[1]), stop.reason.encode())
"""


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_lines_for_a_terminal_that_was_closed_go_nowhere(terminal: str) -> None:
    ours, theirs = os.openpty()
    answer, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG_UP, str(write), "0.5"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        pass_fds=(write,),
        start_new_session=True,
        env=os.environ | {"TERM": terminal},
    )
    for descriptor in (theirs, write):
        os.close(descriptor)
    assert os.read(answer, 1) == b"r"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert os.read(answer, 100).decode() == WORDS[signal.SIGHUP]
    os.close(answer)
