"""What is shown while a run trains, and tables in files and on terminals."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness import terminal as progress
from harness.terminal import Progress, duration, listed, own_screen, run_command, say, si, table

STATUS = [["topk-n64-k4-s0-e7dca19d79", "done", "100%", "-"], ["switch-n128-k4-s1-de3d8ee02b", "failed", "7%", "node1"]]
HEADINGS = ("run", "status", "progress", "host")


SWEEP = Path(__file__).parent / "analysis" / "data" / "recorded_quick"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """An empty terminal of 80 columns with colours."""
    for name in ("NO_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    return Terminal()


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


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
    shown.start("a-run-with-quite-a-long-name-0123456789abcdef", 1000)
    shown.update(500, {"loss": 0.5, "fvu": 0.25, "dead_frac": 0.0})
    last = re.split(r"[\r\n]", without_codes(terminal.getvalue()).rstrip())[-1]
    assert re.fullmatch(r"a-run-with-.*… ━+╺?━* +50% loss 0.5 fvu 0.2500 dead 0.0% [\d,]+ tok/s, \d+s left", last)
    assert len(last) <= 80
    shown.finish("")


def test_a_terminal_without_a_cursor_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    shown = Progress(terminal)
    shown.start("run", 1000)
    shown.update(900, {"loss": 0.5})
    shown.finish("run: done")
    assert terminal.getvalue() == "run: done\n"


def test_a_table_in_a_file_is_plain_and_whole(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = table(HEADINGS, STATUS, left=("status", "host"), optional=("host",), stream=io.StringIO())
    assert text.splitlines() == [
        "run                           status  progress  host",
        "topk-n64-k4-s0-e7dca19d79     done        100%  -",
        "switch-n128-k4-s1-de3d8ee02b  failed        7%  node1",
    ]


def test_a_table_on_a_wide_terminal_has_coloured_status_words(terminal: Terminal) -> None:
    text = table(HEADINGS, STATUS, left=("status", "host"), stream=terminal)
    assert re.findall(r"\x1b\[(\d+)m(\w+)", text) == [("32", "done"), ("31", "failed")]
    plain = table(HEADINGS, STATUS, left=("status", "host"), stream=io.StringIO())
    assert [line.rstrip() for line in without_codes(text).splitlines()] == plain.splitlines()


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_a_table_without_colours(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert "\x1b" not in table(HEADINGS, STATUS, stream=terminal)


def test_a_table_fits_a_narrow_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(width: int) -> list[str]:
        monkeypatch.setenv("COLUMNS", str(width))
        rows = [[*row, "-"] for row in STATUS]
        headings, optional = (*HEADINGS, "left"), ("progress", "host", "left")
        return [
            line.rstrip()
            for line in without_codes(table(headings, rows, optional=optional, stream=terminal)).splitlines()
        ]

    assert shown(61)[0].split() == ["run", "status", "progress", "host", "left"]
    assert shown(60)[0].split() == ["run", "status", "progress", "host"], "empty columns are dropped first"
    assert shown(50)[0].split() == ["run", "status", "host"]
    assert shown(40)[0].split() == ["run", "status"]
    assert shown(30)[2].split() == ["switch-n128-k4-s1-d…", "failed"]
    assert all(len(line) <= width for width in range(20, 70) for line in shown(width))


def test_a_very_long_table_is_plain_on_a_terminal_too(terminal: Terminal) -> None:
    rows = [["x" * 100, "done"] for _ in range(progress.MOST_FITTED_ROWS + 1)]
    lines = table(("run", "status"), rows, stream=terminal).splitlines()
    assert len(lines) == len(rows) + 1 and lines[-1] == "x" * 100 + "    done"


def test_a_screen_is_given_back(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), own_screen(terminal) as show:
        show("\n".join(f"line {i} " + "x" * 100 for i in range(100)))
        raise KeyboardInterrupt
    text = terminal.getvalue()
    assert "line 23" in text and "line 24" not in text
    assert all(len(line) <= 80 for line in without_codes(text).splitlines())
    assert text.rfind("\x1b[?1049l") > text.rfind("\x1b[?1049h") >= 0
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


def test_the_import_is_cheap() -> None:
    program = "import harness.terminal, sys; print({'rich', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    "command",
    [
        ("harness.status", str(SWEEP)),
        ("harness.launch", "--study", "quick", "--dry-run"),
        ("analysis", "fit", str(SWEEP)),
    ],
    ids=" ".join,
)
def test_a_command_ends_silently_when_nobody_reads_its_output(command: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", *command], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_another_broken_pipe_is_an_error() -> None:
    def main() -> int:
        raise BrokenPipeError("a socket")

    with pytest.raises(BrokenPipeError, match="a socket"):
        run_command(main)


def test_say(capsys: pytest.CaptureFixture[str]) -> None:
    say("a line")
    assert capsys.readouterr() == ("", "a line\n")


def test_numbers_and_lists() -> None:
    assert [si(value) for value in (0.0, 12.345, 999.6, 3_149_999, 2e12)] == ["0", "12.3", "1k", "3.15M", "2T"]
    assert listed(["a", "b"]) == "a; b" and listed("abcdefg") == "a; b; c; d; e and 2 more"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (185, "3m05s"), (7800, "2h10m"), (1e6, "11d13h"), (-1, "0s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (
            PermissionError(13, "Permission denied", "/x/sae.safetensors"),
            2,
            "error: /x/sae.safetensors: Permission denied",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_command_ends_in_a_line_and_not_in_a_traceback(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise raised

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(line.startswith(said) for line in lines)
