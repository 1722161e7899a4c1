"""A run on windows, really killed: its producer ends with it, and its weights are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiny import TINY

KILLS = 3


def words(models: dict[str, Path], text: Path, out: Path) -> list[str]:
    """120 steps of 256 rows: five windows of the text, more than once."""
    kept = [word for word in TINY if not word.startswith(("activations", "train.tokens"))]
    return [
        *("activations=lm", f"activations.model={models['llama']}", "activations.layer=1", "activations.text=files"),
        *(f"activations.text_paths=[{text}/*.txt]", "activations.context=16", "activations.lm_precision=fp32"),
        *("activations.tokens=5000", "activations.heldout_tokens=512", "activations.dtype=fp32"),
        *("activations.keep=window", "activations.window_tokens=1000"),
        *(*kept, "train.tokens=30720", "train.checkpoint_every_steps=7", f"out={out}"),
    ]


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "harness.launch", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def steps(out: Path) -> int:
    """The last step in the record."""
    lines = [line for path in out.glob("t/*/metrics.jsonl") for line in path.read_text().splitlines(keepends=True)]
    return max([json.loads(line)["step"] for line in lines if line.endswith("\n")], default=0)


@pytest.mark.slow
def test_a_killed_run_on_windows_ends_with_the_same_weights(
    models_on_disk: dict[str, Path], text_files: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(words(models_on_disk, text_files, whole)).wait(timeout=300) == 0
    for kill in range(1, KILLS + 1):
        process = start(words(models_on_disk, text_files, cut))
        end = time.monotonic() + 300
        while steps(cut) < 25 * kill and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert steps(cut) < 120, "killed before the end"
    producers = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(cut).encode() in _read(path)]
    end = time.monotonic() + 30
    while producers and time.monotonic() < end:
        time.sleep(0.1)
        producers = [path for path in producers if str(cut).encode() in _read(path)]
    assert not producers, "they end with the training"
    assert start(words(models_on_disk, text_files, cut)).wait(timeout=300) == 0
    (expected,), (found,) = (list(out.glob("t/*/sae/sae.safetensors")) for out in (whole, cut))
    assert found.read_bytes() == expected.read_bytes() and load_file(found)
    assert not list(cut.glob("_activations/*.windows/*/"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
