"""What is shown while a run trains."""

import io

import pytest

from harness import terminal as progress
from harness.terminal import Progress, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    shown = Progress(stream)
    shown.start("run", 1000, 100)
    shown.update(900, {"loss": 0.5, "fvu": 0.25, "dead_frac": 0.0})
    shown.note("a note")
    shown.finish("run: done")
    assert "run:" in stream.getvalue()
    assert "a note\n" in stream.getvalue()
    assert stream.getvalue().endswith("run: done\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (185, "3m05s"), (7800, "2h10m"), (1e6, "11d13h"), (-1, "0s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
