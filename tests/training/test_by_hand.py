"""Ranks that torchrun starts on a frozen run, and a run that is started twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from tests.training.members import run, small_config
from tests.training.ranks import SWITCH, join, logs, prepare, processes, start

__all__ = ["processes"]

RESUMABLE = 1
"""torchrun's own exit code when a signal ends it, or a worker leaves with anything but 0; ours, 75, is in its log."""


def torchrun(run_dir: Path, world: int) -> subprocess.Popen[str]:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "-m", "harness.train"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, str(run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.dist
def test_torchrun_gives_the_result_of_one_process(tmp_path: Path) -> None:
    config = small_config(train__precision="fp64", train__ema=0.9, **SWITCH)
    alone = run(tmp_path / "alone", config)
    run_dir = prepare(tmp_path / "four" / "run", config, dp=2, shard=2)
    process = torchrun(run_dir, 4)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    result = json.loads((run_dir / "result.json").read_text())
    assert result["fvu"] == pytest.approx(alone["fvu"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.dist
def test_sigterm_to_torchrun_saves_and_the_run_can_go_on(tmp_path: Path) -> None:
    config = small_config(train__precision="fp64", train__tokens=64 * 1500)
    run_dir = prepare(tmp_path / "run", config, shard=2)
    process = torchrun(run_dir, 2)
    end = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").stat().st_size:
        assert time.monotonic() < end, "no step was made"
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == RESUMABLE, output
    (marker,) = (run_dir / "checkpoints").glob("step-*/marker.json")
    assert 0 < json.loads(marker.read_text())["step"] < 1500
    assert not (run_dir / "claim.json").exists()
    resumed, alone = run(run_dir, config), run(tmp_path / "alone", config)
    assert resumed["fvu"] == pytest.approx(alone["fvu"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.dist
def test_of_two_starts_at_once_one_trains(processes: ForkServerContext, tmp_path: Path) -> None:
    run_dir = prepare(tmp_path / "run", small_config(train__tokens=64 * 300))
    first = start(processes, run_dir, 1)
    while not (run_dir / "claim.json").exists():
        assert first[0].is_alive()
        time.sleep(0.005)
    assert join(start(processes, run_dir, 1)) == [2]
    assert "claim.json is being worked on by process" in logs(run_dir)
    assert join(first) == [0], logs(run_dir)
    assert json.loads((run_dir / "result.json").read_text())["attempts"] == 1
