"""`metrics.jsonl`: whole lines, no gap and no repetition after a resume."""

import json
import math
from pathlib import Path

import pytest

from harness.record.metrics import MetricsFile, cut_back, last, read


def write(path: Path, steps: int) -> None:
    with MetricsFile(path) as file:
        for step in range(1, steps + 1):
            file.append({"step": step, "tokens": 10 * step, "loss": 1 / step})


def test_lines_are_readable_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.append({"step": 1, "loss": 0.5})
    assert read(path) == [{"step": 1, "loss": 0.5}]
    file.close()
    file.close()


def test_values_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.append({"step": 1, "loss": math.nan, "lr": math.inf})
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "lr": None}


def test_a_torn_last_line_is_left_out_and_then_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read(path)] == [1, 2, 3]
    cut_back(path, path.stat().st_size)
    with MetricsFile(path) as file:
        file.append({"step": 4})
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4]


def test_cutting_back_to_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as file:
        file.append({"step": 1, "loss": 0.5})
        file.append({"step": 2, "loss": 0.25})
        saved = file.position()
        file.append({"step": 2, "fvu": 0.3})  # of the same step, but after the checkpoint: it will be made again
        file.append({"step": 3, "loss": 0.125})
    cut_back(path, saved)
    assert read(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    with MetricsFile(path) as file:
        assert file.position() == saved
    cut_back(path, 0)
    assert read(path) == []
    cut_back(tmp_path / "missing", 3)
    assert read(tmp_path / "missing") == []


def test_a_damaged_line_in_the_middle_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 3)
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:8]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read(path)
    assert [line["step"] for line in read(path, skip_damaged=True)] == [1, 3]


def test_the_newest_values_without_reading_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last(path) == {}
    write(path, 2000)
    with MetricsFile(path) as file:
        file.append({"step": 2000, "fvu": 0.2})
        file.append({"step": 2001, "tokens": 7})
    newest = last(path)
    assert (newest["step"], newest["fvu"], newest["tokens"]) == (2001, 0.2, 7)
    with path.open("a") as file:
        file.write('{"step": 20')
    assert last(path)["step"] == 2001
