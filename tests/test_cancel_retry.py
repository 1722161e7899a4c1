"""Ending what runs, and trying again what went wrong; what needs a Slurm is in tests/slurm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import cancel, retry
from harness.process.claim import claim
from harness.record.result import read_result
from tests.tiny import TINY, Launch


def test_a_diverged_cell_is_tried_with_a_change(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("train.lr=1e30") == 1
    sweep_dir = tmp_path / "t"
    (diverged,) = (path.parent.name for path in sweep_dir.glob("*/result.json"))
    assert retry.main([str(sweep_dir)]) == 2
    assert "no run of" in capsys.readouterr().err
    assert retry.main([str(sweep_dir), diverged]) == 2
    assert "change a setting" in capsys.readouterr().err
    assert retry.main([str(sweep_dir), "train.lr=1e-3"]) == 0
    results = {path.parent.name: json.loads(path.read_text())["status"] for path in sweep_dir.glob("*/result.json")}
    assert sorted(results.values()) == ["diverged", "done"]
    assert results[diverged] == "diverged"
    study = json.loads((sweep_dir / "study.json").read_text())
    assert set(study["runs"]) == set(results)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "there is no sweep at nowhere"),
        (["{sweep}", "topk-n1"], "has no run topk-n1"),
        (["{sweep}", "train.lr=fast"], "cannot apply train.lr=fast"),
        (["{sweep}", "train.speed=9"], "cannot apply train.speed=9"),
    ],
)
def test_wrong_requests_are_one_line(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert launch("train.lr=1e30") == 1
    capsys.readouterr()
    assert retry.main([word.format(sweep=tmp_path / "t") for word in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and told in line


def test_a_local_launch_is_cancelled_and_goes_on_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "harness.launch", *TINY, "train.tokens=2e6", f"out={tmp_path}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not any(tmp_path.glob("t/*/metrics.jsonl")) and time.monotonic() < end:
        time.sleep(0.05)
    assert cancel.main([str(tmp_path / "t")]) == 0
    assert "was asked to save and stop" in capsys.readouterr().out
    process.communicate(timeout=120)
    assert process.returncode == 75
    (run_dir,) = (path.parent for path in tmp_path.glob("t/*/config.yaml"))
    assert read_result(run_dir) is None and list((run_dir / "checkpoints").glob("step-*"))
    assert cancel.main([str(tmp_path / "t")]) == 0
    assert capsys.readouterr().out == "nothing queued or running\n"
    assert cancel.main([str(tmp_path / "t"), "topk-n1"]) == 2
    assert "has no run topk-n1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "refused", "said"),
    [
        ({"host": "elsewhere"}, None, "cancel it there"),
        ({"machine": "another container"}, None, "cancel it there"),  # its process id may be anybody's here
        ({}, PermissionError(1, "not permitted"), "belongs to another user"),
        ({}, ProcessLookupError(3, "no such process"), "nothing queued or running"),
        ({"job": "77"}, None, "was asked to save and stop"),  # launched in an allocation, not by a job of the sweep
    ],
)
def test_what_cannot_be_cancelled_here(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    refused: OSError | None,
    said: str,
) -> None:
    asked: list[int] = []

    def kill(pid: int, number: int) -> None:
        asked.append(pid)
        if refused is not None:
            raise refused

    monkeypatch.setattr(cancel.os, "kill", kill)
    run_dir = tmp_path / "t" / "topk-n1"
    run_dir.mkdir(parents=True)
    with claim(run_dir / "claim.json"):
        owner = json.loads((run_dir / "claim.json").read_text()) | changes
        (run_dir / "claim.json").write_text(json.dumps(owner))
        assert cancel.main([str(tmp_path / "t")]) == 0
    assert said in capsys.readouterr().out
    assert asked == ([] if said == "cancel it there" else [os.getpid()])


def test_cancelling_a_sweep_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cancel.main(["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: there is no sweep at nowhere")
