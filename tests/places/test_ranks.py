"""Ranks that the launcher starts on this machine: they give the result of one process, and die together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.record.result import read_result

CELL = [
    *("activations=synthetic", "activations.heldout_tokens=2048", "train=quick", "train.tokens=16384", "train.lr=1e-3"),
    *("train.warmup_tokens=0",),
    *("sae.n_latents=64", "sae.k=4", "tracker=none", "train.eval_rows=1024", "train.log_every_steps=16"),
]


def launch(out: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "harness.launch", *CELL, f"out={out}", "sweep=s", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # threads that wait for each other are slow on a busy machine
    )


def result(out: Path) -> dict:
    (run_dir,) = (path.parent for path in (out / "s").glob("*/config.yaml"))
    found = read_result(run_dir)
    assert found is not None
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_a_mesh_is_one_override_away_and_gives_the_result_of_one_process(tmp_path: Path) -> None:
    for name, mesh in (("one", ()), ("four", ("mesh.dp=2", "mesh.shard=2"))):
        process = launch(tmp_path / name, "sae=topk", *mesh)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
    one, four = result(tmp_path / "one"), result(tmp_path / "four")
    assert one["run_id"] == four["run_id"]
    assert four["fvu"] == pytest.approx(one["fvu"], rel=1e-4)
    (metrics,) = (tmp_path / "four").glob("s/*/metrics.jsonl")
    assert "bytes_sent_reconstruction" in metrics.read_text()


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_is_named(tmp_path: Path) -> None:
    process = launch(tmp_path, "sae=topk", "mesh.shard=2", "train.tokens=1e9")
    victim = wait_for_rank(process, 1)
    wait_for_metrics(tmp_path)
    os.kill(victim.pid, signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in output
    (log,) = tmp_path.glob("s/*/attempts/1/log.txt")
    assert f"(log: {log}" in output and "rank1.log" in log.read_text()
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.dist
@pytest.mark.slow
def test_sigterm_saves_once_on_all_ranks_and_the_same_command_goes_on(tmp_path: Path) -> None:
    process = launch(tmp_path, "sae=switch", "mesh.shard=2", "train.tokens=3e5")
    wait_for_metrics(tmp_path)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    (marker,) = tmp_path.glob("s/*/checkpoints/step-*/marker.json")
    assert '"shard": 2' in marker.read_text()
    # on another mesh: one process takes over
    process = launch(tmp_path, "sae=switch", "train.tokens=3e5")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert result(tmp_path)["status"] == "done" and result(tmp_path)["attempts"] == 2


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_end_with_the_launcher_whatever_ends_it(tmp_path: Path) -> None:
    """Its claim is free as soon as it is gone, so nobody may train on; what was saved is there and goes on."""
    cell = ("sae=topk", "mesh.shard=2", "train.tokens=1e9", "train.checkpoint_every_steps=50")
    for end in ((signal.SIGKILL,), (signal.SIGINT, signal.SIGINT)):
        process = launch(tmp_path, *cell)
        ranks = [wait_for_rank(process, rank) for rank in (0, 1)]
        wait_for_checkpoint(tmp_path, beyond=newest_checkpoint(tmp_path))
        for number in end:
            process.send_signal(number)
            time.sleep(0.02)
        process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGINT, 75)
        assert psutil.wait_procs(ranks, timeout=10)[1] == []
        assert newest_checkpoint(tmp_path) > 0


@pytest.mark.dist
@pytest.mark.slow
def test_sigterm_while_the_ranks_are_starting_is_an_interruption(tmp_path: Path) -> None:
    process = launch(tmp_path, "sae=topk", "mesh.shard=2", "train.tokens=1e9")
    wait_for_rank(process, 1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert not list(tmp_path.glob("s/*/result.json"))


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_killed_when_asked_twice(tmp_path: Path) -> None:
    process = launch(tmp_path, "sae=topk", "mesh.shard=2", "train.tokens=1e9", "train.checkpoint_every_steps=50")
    ranks = [wait_for_rank(process, rank) for rank in (0, 1)]
    wait_for_checkpoint(tmp_path, beyond=0)
    ranks[1].suspend()
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert "asked twice: ranks that have not saved in 20 s will be killed" in output
    assert "killed the ranks that did not answer: 0, 1" in output
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert newest_checkpoint(tmp_path) > 0 and not list(tmp_path.glob("s/*/result.json"))


@pytest.mark.dist
@pytest.mark.slow
def test_a_suspended_rank_ends_with_the_launcher(tmp_path: Path) -> None:
    process = launch(tmp_path, "sae=topk", "mesh.shard=2", "train.tokens=1e9")
    ranks = [wait_for_rank(process, rank) for rank in (0, 1)]
    wait_for_metrics(tmp_path)
    ranks[1].suspend()
    process.kill()
    process.communicate(timeout=60)
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


STEP = {
    **{"SLURM_JOB_ID": "78", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
    **{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "OMP_NUM_THREADS": "1"},
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_wait_for_ranks_is_announced_and_ends_when_asked(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "harness.launch", *CELL, "sae=topk", "mesh.dp=2", f"out={tmp_path}", "sweep=s"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | STEP) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("waiting"))
        assert said == "waiting for 1 of 2 ranks of step 78.0\n"
        process.send_signal(number)
        assert process.wait(30) == 75


def newest_checkpoint(out: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in out.glob("s/*/checkpoints/step-*")), default=0)


def wait_for_checkpoint(out: Path, beyond: int) -> None:
    end = time.monotonic() + 120
    while newest_checkpoint(out) <= beyond:
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.02)


def wait_for_rank(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # a short-lived helper such as git
                if child.environ().get("RANK") == str(rank):
                    return child
        time.sleep(0.05)
    raise AssertionError(f"rank {rank} was not started")


def wait_for_metrics(out: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if any(path.stat().st_size for path in out.glob("s/*/metrics.jsonl")):
            return
        time.sleep(0.05)
    raise AssertionError("no step was made")


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_harvest_together_the_store_that_one_process_makes(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [
        json.dumps({"text": f"Document {i}. " + f"The number {i} has the square {i * i}. " * 40}) for i in range(300)
    ]
    text.write_text("\n".join(lines))
    harvested = [
        *("activations=minilm", "activations.text=files", f"activations.text_paths=[{text}]"),
        *("activations.tokens=66000", "activations.heldout_tokens=4000", "sae=topk", "train.tokens=8192"),
    ]
    manifests = []
    for name, mesh in (("one", ()), ("two", ("mesh.shard=2",))):
        process = launch(tmp_path / name, *harvested, *mesh)
        output = process.communicate(timeout=400)[0]
        assert process.returncode == 0, output
        (manifest,) = (tmp_path / name / "_activations").glob("*/manifest.json")
        manifests.append(manifest.read_text())
    assert manifests[0] == manifests[1]
