"""How a record is read while it grows, and how runs are kept apart."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from harness.config import Config, TrackerConfig
from harness.errors import WRONG_REQUEST, UserError
from harness.files import write_json_atomic, write_text_atomic
from harness.mirror import __main__ as process
from harness.mirror import copies
from harness.mirror.copies import Tail, check, finish, send
from tests.mirror.conftest import LINES, MakeRun
from tests.tiny import Launch


def text(*steps: int, name: str = "loss") -> str:
    return "".join(json.dumps({"step": step, name: step}) + "\n" for step in steps)


def read(tail: Tail) -> list[int]:
    return [line["step"] for line in tail.read()]


def test_a_torn_line_is_left_for_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert read(tail) == []
    path.write_text(text(1, 2) + '{"step": 3, "lo')
    assert read(tail) == [1, 2]
    assert read(tail) == []
    path.write_text(text(1, 2, 3))
    assert read(tail) == [3]


@pytest.mark.parametrize("cut", [write_text_atomic, Path.write_text])
@pytest.mark.parametrize("kept", [(), (1,), (1, 2, 3), (1, 2, 3, 4)])
def test_steps_are_not_read_again_after_a_cut(tmp_path: Path, cut: Any, kept: tuple[int, ...]) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text(text(1, 2, 3, 4, 5))
    assert read(tail) == [1, 2, 3, 4, 5]
    cut(path, text(*kept))
    assert read(tail) == []
    cut(path, text(*kept, 4, 5) if kept[-1:] != (4,) else text(*kept, 5))
    assert read(tail) == []
    with path.open("a") as file:
        file.write(text(6))
    assert read(tail) == [6]


def test_a_record_that_has_regrown_between_two_looks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text(text(1, 2, 3))
    assert read(tail) == [1, 2, 3]
    write_text_atomic(path, text(1))
    with path.open("a") as file:
        file.write(text(2, 3, 4, 5, 6, 7))
    assert read(tail) == [4, 5, 6, 7]


def test_the_second_line_of_a_step_is_not_lost_by_a_cut(tmp_path: Path) -> None:
    """A step has a line of training and one of evaluation."""
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    path.write_text(text(1, 2))
    assert read(tail) == [1, 2]
    write_text_atomic(path, text(1, 2) + text(2, name="fvu"))
    assert tail.read() == [{"step": 2, "fvu": 2}]


def test_a_damaged_line_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError):
        Tail(tmp_path / "metrics.jsonl").read()


class Kept:
    """A copy that keeps what it is given."""

    note = ""

    def __init__(self, next_step: int = 0) -> None:
        self.next_step = next_step
        self.lines: list[Mapping[str, Any]] = []
        self.ended: tuple[Mapping[str, Any], int] | None = None

    def log(self, line: Mapping[str, Any]) -> None:
        self.lines.append(line)

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self.ended = (summary, exit_code)


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("diverged", 1), ("failed", 1), ("interrupted", 1)])
def test_what_a_copy_is_given(status: str, code: int) -> None:
    copy = Kept(next_step=3)
    send(copy, LINES[:5])
    assert [line["step"] for line in copy.lines] == [3, 4, 5]
    finish(copy, {"status": status, "fvu": 0.5, "converged": False, "mse": None, "config": {"a": 1}})
    assert copy.ended == ({"status": status, "fvu": 0.5, "converged": False}, code)


def test_a_copy_that_hangs_does_not_hold_up_others(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    released, kept = threading.Event(), {"one": Kept(), "two": Kept()}

    def open_copy(run_dir: Path, config: Config, *, live: bool) -> copies.Copy:
        if run_dir.name == "one":
            released.wait(30)
        return kept[run_dir.name]

    monkeypatch.setattr(copies, "open_copy", open_copy)
    followers = []
    for name in kept:
        run_dir = make_run(name)
        (run_dir / "metrics.jsonl").write_text(text(1, 2, 3))
        write_json_atomic(run_dir / "result.json", {"status": "done"})
        followers.append(process.Follower(run_dir, threading.Event()))
        followers[-1].start()
    followers[1].join(10)
    assert (len(kept["two"].lines), kept["two"].ended) == (3, ({"status": "done"}, 0))
    assert kept["one"].ended is None
    released.set()
    followers[0].join(10)
    assert (len(kept["one"].lines), kept["one"].ended) == (3, ({"status": "done"}, 0))


def test_a_run_that_goes_on_in_the_same_program_goes_on_in_its_copy(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, run_dir = Kept(), make_run()
    monkeypatch.setattr(copies, "open_copy", lambda run_dir, config, *, live: copy)
    (run_dir / "metrics.jsonl").write_text(text(1, 2, 3))
    follower = process.Follower(run_dir, threading.Event())
    follower.start()
    deadline = time.monotonic() + 10
    while len(copy.lines) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    write_text_atomic(run_dir / "metrics.jsonl", text(1))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(text(2, 3, 4))
    write_json_atomic(run_dir / "result.json", {"status": "done"})
    follower.join(10)
    assert [line["step"] for line in copy.lines] == [1, 2, 3, 4]
    assert copy.ended == ({"status": "done"}, 0)


def test_the_process_loads_no_torch() -> None:
    code = "import sys, harness.mirror.__main__, harness.mirror.to_wandb; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_a_missing_package_is_refused_at_launch(
    name: str, launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = f"tracker={name} needs the package {name}: pip install 'sae-scaling[{name}]'"
    with pytest.raises(UserError) as refused:
        check(TrackerConfig(name=name))
    assert str(refused.value).startswith(line)
    check(TrackerConfig(name="none"))
    monkeypatch.setattr("harness.sweep.request.check_tracker", check)
    assert launch(f"tracker={name}") == WRONG_REQUEST
    assert line in capsys.readouterr().err
    assert not list(tmp_path.glob("t/*"))
