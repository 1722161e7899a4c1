"""Tables in files and on terminals, numbers and commands in few characters."""

import io
import os
import re
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.cli import main as analysis
from harness import cancel, export, replay, retry, status
from harness.launch import main as launch
from harness.terminal import (
    MOST_FITTED_ROWS,
    duration,
    listed,
    own_screen,
    path_argument,
    python_command,
    rough_duration,
    run_command,
    say,
    shown_path,
    si,
    table,
    this_command,
)
from sweeps.__main__ import main as sweeps

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
    rows = [["x" * 100, "done"] for _ in range(MOST_FITTED_ROWS + 1)]
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
    program = "import harness.terminal, harness.progress, sys; print({'rich', 'torch', 'numpy'} & set(sys.modules))"
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "1 s"), (59.4, "59 s"), (59.6, "1 min"), (540, "9 min"), (3599, "1 h"), (9000, "2.5 h"), (3e5, "3.5 days")],
)
def test_rough_durations(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text


def test_paths_and_commands_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "orig_argv", [".venv/bin/python", "-m", "harness.launch", "sweep=my runs"])
    assert shown_path(tmp_path / "runs" / "a") == "runs/a"
    assert shown_path(Path("runs/my sweep")) == "'runs/my sweep'"
    assert shown_path(Path("/elsewhere/a")) == "/elsewhere/a"
    assert python_command("harness.retry", tmp_path / "runs/a", "train.lr=1e-3") == (
        ".venv/bin/python -m harness.retry runs/a train.lr=1e-3"
    )
    assert this_command() == ".venv/bin/python -m harness.launch 'sweep=my runs'"


def test_paths_of_commands_expand_as_in_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "$odd").touch()
    monkeypatch.chdir(tmp_path)
    assert path_argument("~/a") == path_argument("$HOME/a") == path_argument("${HOME}/a") == tmp_path / "a"
    assert path_argument("$odd") == Path("$odd"), "what exists under its literal name is meant"
    with pytest.raises(ArgumentTypeError, match=r"\$NOT_SET, and no such environment variable is set"):
        path_argument("$NOT_SET/a")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (status.main, ["~/no"]),
        (cancel.main, ["~/no"]),
        (retry.main, ["~/no"]),
        (replay.main, ["~/no"]),
        (export.main, ["~/no", "--format", "saelens", "--out", "~/x"]),
        (analysis, ["fit", "~/no"]),
        (analysis, ["report", "~/no"]),
        (sweeps, ["--study", "~/no.yaml"]),
        (launch, ["--study", "~/no.yaml"]),
    ],
)
def test_every_command_reads_its_paths_alike(
    main: Callable[[list[str]], int],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(arguments) == 2
    assert f"{tmp_path}/no" in capsys.readouterr().err


@pytest.mark.parametrize(
    "main", [launch, sweeps, analysis, status.main, cancel.main, retry.main, export.main, replay.main]
)
def test_an_argument_that_is_not_known_is_refused_in_one_line(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--no-such-option"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "--help)" in told
