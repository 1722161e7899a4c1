"""Cells that really train, through the launcher: what is skipped, resumed, retried, refused."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.process.claim import claim
from harness.record import metrics
from harness.record.job import Job
from harness.sweep.rows import sweep_rows
from tests.tiny import TINY, Launch


def results(out: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(out.glob("*/*/result.json"))}


def only_run(out: Path) -> Path:
    (config,) = out.glob("t/*/config.yaml")
    return config.parent


def test_a_grid_is_trained_once(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("sae=topk,switch", "sae.n_latents=32,64", "sae.n_experts=1")
    assert launch(*grid) == 0
    first = results(tmp_path)
    assert [r["status"] for r in first.values()] == ["done"] * 4
    output = capsys.readouterr().err
    assert output.count("fvu 0.") == 4
    assert "4 of 4 cells done" in output

    assert launch(*grid) == 0
    assert "all 4 cells already done" in capsys.readouterr().err
    assert results(tmp_path) == first

    assert launch(*grid, "sae.n_latents=32,64,128") == 0
    output = capsys.readouterr().err
    assert "4 of 6 cells already done" in output
    assert output.count("fvu 0.") == 2
    wider = results(tmp_path)
    assert first.items() <= wider.items()
    assert len(json.loads((tmp_path / "t/study.json").read_text())["runs"]) == 6


def test_the_run_directory_is_complete(launch: Launch, tmp_path: Path) -> None:
    assert launch() == 0
    run_dir = only_run(tmp_path)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["train"]["precision"] in ("fp32", "bf16")
    assert (run_dir / "sae/sae.safetensors").is_file()
    log = (run_dir / "attempts/1/log.txt").read_text()
    assert run_dir.name in log
    provenance = json.loads((run_dir / "provenance.json").read_text())
    assert {"git", "versions", "machine", "command", "ops", "store_id", "threads"} <= provenance.keys()
    result = json.loads((run_dir / "result.json").read_text())
    contract = (
        "status run_id sae n_latents k n_experts d_model seed tokens unique_tokens steps flops params fvu mse l0 "
        "dead_frac wall_s tokens_per_s converged config"
    )
    assert set(contract.split()) <= result.keys()
    assert result["run_id"] == run_dir.name
    steps = [line["step"] for line in metrics.read(run_dir / "metrics.jsonl") if "loss" in line]
    assert steps == sorted(set(steps))
    assert not (run_dir / "claim.json").exists()


def test_cheap_cells_come_first(launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("sae.n_latents=128,32,64") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "fvu 0." in line]
    assert [re.sub(r"\[(\d of 3).*\] (n=\d+): .*", r"\1 \2", line) for line in lines] == [
        "1 of 3 n=32",
        "2 of 3 n=64",
        "3 of 3 n=128",
    ]


def test_a_dry_run_writes_nothing(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("sae.n_latents=32,64", "--dry-run") == 0
    assert "2 cells: 2 pending" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert launch() == 0
    assert launch("sae.n_latents=32,64", "--dry-run") == 0
    assert "2 cells: 1 done, 1 pending" in capsys.readouterr().out


def test_a_diverged_cell_is_a_result(launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ("train.lr=1e30,1e-3",)
    assert launch(*grid) == 1
    assert sorted(r["status"] for r in results(tmp_path).values()) == ["diverged", "done"]
    assert "DIVERGED at step" in capsys.readouterr().err
    assert launch(*grid) == 1
    assert "all 2 cells have ended, 1 of them diverged" in capsys.readouterr().err
    runs = {row["run_id"]: row for row in sweep_rows(tmp_path / "t")}
    assert sorted(row["status"] for row in runs.values()) == ["diverged", "done"]
    assert all(row["attempts"] == 1 for row in runs.values())


def test_a_failing_cell_does_not_stop_the_sweep(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure is injected: a real one that fits every machine would be a bug to repair."""
    import harness.training.run as train_run

    real = train_run.train_job

    def fails_at_32(job: Job, *rest: Any) -> None:
        if job.config.sae.n_latents == 32:
            raise RuntimeError("the device\nis on fire")
        real(job, *rest)

    monkeypatch.setattr(train_run, "train_job", fails_at_32)
    assert launch("sae.n_latents=32,64") == 1
    by_width = {r["n_latents"]: r for r in results(tmp_path).values()}
    assert by_width[32]["status"] == "failed"
    assert by_width[32]["error"] == "RuntimeError: the device is on fire"
    assert by_width[64]["status"] == "done"
    failed = tmp_path / "t" / by_width[32]["run_id"]
    assert "Traceback" in (failed / "attempts/1/log.txt").read_text()
    assert "FAILED" in capsys.readouterr().err

    monkeypatch.undo()
    assert launch("sae.n_latents=32,64") == 0
    assert "failed earlier and will be tried again" in capsys.readouterr().err
    assert json.loads((failed / "attempts/1/result.json").read_text())["status"] == "failed"
    assert (failed / "attempts/2/log.txt").is_file()


def test_a_full_disk_ends_the_sweep_in_one_line(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is injected here; a real full disk is in tests/test_launch.py where a tmpfs can be mounted."""
    import harness.training.run as train_run

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train_run, "train_job", full)
    assert launch("sae.n_latents=32,64") == 1
    assert "no space left" in capsys.readouterr().err
    assert results(tmp_path) == {}


def test_a_run_directory_of_another_configuration_is_refused(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch() == 0
    run_dir = only_run(tmp_path)
    (run_dir / "result.json").unlink()
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("batch_tokens: 256", "batch_tokens: 128"))
    assert launch() == 2
    assert "it was edited or moved here" in capsys.readouterr().err


def test_service_settings_of_a_frozen_run_may_change(launch: Launch, tmp_path: Path) -> None:
    assert launch() == 0
    run_dir = only_run(tmp_path)
    (run_dir / "result.json").unlink()
    assert launch("train.log_every_steps=2") == 0
    assert "log_every_steps: 2" in (run_dir / "config.yaml").read_text()


def test_a_cell_that_somebody_else_trains_is_waited_for(
    launch: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness.places.local as local

    assert launch() == 0
    run_dir = only_run(tmp_path)
    done = (run_dir / "result.json").read_text()
    (run_dir / "result.json").unlink()
    with claim(run_dir / "claim.json"):
        (row,) = sweep_rows(tmp_path / "t")
        assert row["status"] == "running"
        assert row["host"]

        def the_other_finishes(_stop: object) -> None:
            (run_dir / "result.json").write_text(done)
            (run_dir / "claim.json").unlink()

        monkeypatch.setattr(local, "_wait", the_other_finishes)
        assert launch("sae.n_latents=32") == 0
    assert "another process" in capsys.readouterr().err
    assert not (run_dir / "attempts/2").exists()


def test_interrupt_and_resume(tmp_path: Path) -> None:
    """Ctrl-C: exit 75, and the same command ends with the weights of an undisturbed run."""
    long = ["train.tokens=4e5", "train.eval_rows=256", "train.log_every_steps=50"]
    command = [sys.executable, "-m", "harness.launch", *TINY, *long]
    broken = subprocess.Popen([*command, f"out={tmp_path}/a"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(map(Path.exists, tmp_path.glob("a/t/*/metrics.jsonl"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    broken.send_signal(signal.SIGINT)
    _, error = broken.communicate(timeout=120)
    assert broken.returncode == 75, error
    stopped, again = error.strip().splitlines()[-2:]
    assert re.fullmatch(r"interrupted: Ctrl-C; topk n=32 k=2 is saved at step [\d,]+; 0 of 1 cells done", stopped)
    assert again == "to go on: " + shlex.join([*command, f"out={tmp_path}/a"])
    (row,) = sweep_rows(tmp_path / "a/t")
    assert row["status"] == "interrupted" and row["error"].startswith("saved at step"), "not taken for a kill"

    for out in ("a", "b"):
        finished = subprocess.run([*command, f"out={tmp_path}/{out}"], capture_output=True, text=True, timeout=300)
        assert finished.returncode == 0, finished.stderr
    (left,) = tmp_path.glob("a/t/*/sae/sae.safetensors")
    (right,) = tmp_path.glob("b/t/*/sae/sae.safetensors")
    assert left.read_bytes() == right.read_bytes()
    lines = metrics.read(left.parents[1] / "metrics.jsonl")
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps == [line["step"] for line in metrics.read(right.parents[1] / "metrics.jsonl") if "loss" in line]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_directory(tmp_path: Path, launch: Launch, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert launch() == 2
    assert "cannot write to" in capsys.readouterr().err
