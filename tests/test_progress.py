"""What is shown while cells train: lines, a bar, the countdown of the sweep, and the reports of another process."""

import io
import os
import re
import subprocess
import sys
import time

import pytest

from harness import progress
from harness.progress import RELAY_FD, Countdown, Progress, relay
from tests.test_terminal import Terminal, terminal, without_codes

__all__ = ["terminal"]


def test_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("run", 1000, 200)
    shown.update(400, {"loss": 0.5, "fvu": None, "dead_frac": 0.125, "step": 4})
    shown.update(500, {"fvu": 0.25})
    shown.finish("run: done")
    first, second, last = stream.getvalue().splitlines()
    assert first.startswith("run: 40% loss 0.5 dead 12.5% ")
    assert "fvu 0.2500" in second
    assert "left" in second
    assert last == "run: done"


def test_few_lines() -> None:
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("run", 1000)
    for tokens in range(0, 1000, 10):
        shown.update(tokens, {"loss": 1.0})
    shown.finish("")
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal(terminal: Terminal) -> None:
    shown = Progress(terminal)
    shown.start("run", 1000, 100)
    shown.update(900, {"loss": 0.5, "fvu": 0.25, "dead_frac": 0.0})
    shown.note("a note")
    shown.finish("run: done")
    text = without_codes(terminal.getvalue())
    assert "run ━" in text and "90% loss 0.5 fvu 0.2500 dead 0.0% " in text
    assert "a note\n" in text
    assert terminal.getvalue().endswith("run: done\n")


def test_a_bar_leaves_the_cursor_for_whoever_comes_after_a_kill(terminal: Terminal) -> None:
    Progress(terminal).start("run", 1000)
    assert terminal.getvalue().rfind("\x1b[?25h") > terminal.getvalue().rfind("\x1b[?25l")


def test_a_narrow_terminal_shortens_the_label_of_the_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW_INTERVAL_S", 0.0)
    shown = Progress(terminal)
    shown.start("a-run-with-quite-a-long-name-" + 10 * "0123456789", 1000)
    shown.update(500, {"loss": 0.5, "fvu": 0.25, "dead_frac": 0.0})
    last = re.split(r"[\r\n]", without_codes(terminal.getvalue()).rstrip())[-1]
    assert re.fullmatch(r"a-run-with-.*… ━+╺?━* +50%, \d+s left", last)
    assert len(last) <= 80
    shown.finish("")


def test_a_terminal_without_a_cursor_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = Progress(terminal)
    shown.start("run", 1000)
    shown.update(900, {"loss": 0.5})
    shown.finish("run: done")
    assert terminal.getvalue() == "run: done\n"


def test_a_narrow_terminal_keeps_the_name_of_the_cell(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAW_INTERVAL_S", 0.0)
    shown = Progress(terminal)
    shown.countdown = Countdown(30, 6, [100.0] * 24)
    shown.names = {"switch-n1024-k32-e8-s0-0123456789": "switch n=1024 k=32"}
    shown.countdown.begin(1, 100.0)
    shown.start("switch-n1024-k32-e8-s0-0123456789", 1000)
    shown.update(500, {"loss": 0.5, "fvu": 0.25, "dead_frac": 0.0})
    last = re.split(r"[\r\n]", without_codes(terminal.getvalue()).rstrip())[-1]
    assert re.fullmatch(r"\[7 of 30, \d+ \w+ left\] switch n=1024 k=32 ━+[╺╸]?━* 50% fvu 0.2500( [\d,]+ tok/s)?", last)
    assert len(last) <= 80
    shown.finish("")


def test_a_countdown() -> None:
    countdown = Countdown(4, 1, [60.0, 120.0, 120.0])
    assert countdown.words() == "[1 of 4, 5 min left]"
    countdown.begin(1, 60.0)
    assert countdown.words() == "[2 of 4, 5 min left]"
    assert countdown.words(share=0.5) == "[2 of 4, 4 min left]", "half of 60 s less"
    assert countdown.words(share=0.5, own_s=60.0) == "[2 of 4, 5 min left]", "it takes as long as planned in all"
    assert countdown.words(share=0.5, own_s=240.0) == "[2 of 4, 20 min left]", (
        "four times as slow as planned, so will others"
    )
    countdown.end()
    countdown.count(1)
    assert countdown.words().startswith("[2 of 4")
    countdown.begin(2, 120.0)
    assert countdown.words().startswith("[3-4 of 4"), "a pack"
    countdown.end()
    countdown.count(3)
    assert countdown.words() == "[5 of 5]", "a pack that was begun earlier may have cells that nobody asked for now"


def test_a_countdown_without_a_plan_counts() -> None:
    countdown = Countdown(3, 0, [None, 10.0, None])
    countdown.begin(1, None)
    assert countdown.words() == "[1 of 3]" and countdown.left_s() is None


def test_every_line_tells_the_place_in_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    stream = io.StringIO()
    shown = Progress(stream)
    shown.countdown, shown.names = Countdown(2, 0, [10.0, 10.0]), {"run": "k=4"}
    shown.start("harvest", 1000)
    shown.update(500, {})
    shown.countdown.begin(1, 10.0)
    shown.start("run", 1000)
    shown.update(10, {"fvu": 0.5})
    harvest, run = stream.getvalue().splitlines()
    assert harvest.startswith("harvest: 50% ") and harvest.endswith(" left"), "no cell of the sweep"
    assert run.startswith("[1 of 2, 20 s left] k=4: 1% fvu 0.5000 ") and run.count("left") == 1


def test_another_process_reports_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    program = """
from harness.progress import own_progress
shown = own_progress()
shown.note("a note")
shown.start("run", 1000, 100)
shown.update(500, {"fvu": 0.25, "step": 3})
shown.finish("")
"""
    stream = io.StringIO()
    with relay(Progress(stream)) as descriptor:
        environment = os.environ | {RELAY_FD: str(descriptor)}
        subprocess.run([sys.executable, "-c", program], env=environment, pass_fds=(descriptor,), check=True)
    note, line = stream.getvalue().splitlines()
    assert note == "a note" and line.startswith("run: 50% fvu 0.2500 ")


def test_a_reader_that_is_gone_or_stopped_holds_up_nobody() -> None:
    read_end, write_end = os.pipe()
    sender = progress.Relayed(write_end)
    begin = time.monotonic()
    for _ in range(10_000):
        sender.note("x" * 100)
    os.close(read_end)
    sender.note("nobody reads")
    os.close(write_end)
    assert time.monotonic() - begin < 10
