"""Who computes windows: a process that trainings share, and ranks of their own. The rows are the same."""

from __future__ import annotations

import dataclasses
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from harness.activations.open import open_source
from harness.activations.window.compute import Readers
from harness.activations.window.source import Windows
from harness.config import ActivationsConfig
from harness.process.signals import StopFlag
from tests.activations.test_window_kills import start, steps, words

ROWS = 700
CPU = torch.device("cpu")


def test_windows_are_kept_for_the_training_that_is_behind() -> None:
    ended: list[bool] = []
    readers, ahead, behind = Readers(lambda: ended.append(True)), object(), object()
    assert readers.admit(behind, 4) and readers.admit(ahead, 5) and not readers.admit(object(), 6)
    assert not readers.admit(object(), 3)
    readers.train_on(ahead, 6)
    assert readers.first == 4
    readers.leave(behind)
    assert readers.first == 6 == readers.wait_for_other_than(4) and not ended
    readers.leave(ahead)
    assert ended


def producers(out: Path) -> list[psutil.Process]:
    """Processes that compute windows in `out`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or ()
        if any(str(out) in word for word in line) and "harness.activations.window.produce" in line:
            found.append(process)
    return found


@pytest.mark.slow
def test_trainings_at_one_place_share_a_process(tiny: ActivationsConfig, tmp_path: Path) -> None:
    cfg = dataclasses.replace(tiny, keep="window", window_tokens=ROWS, dtype="bf16")
    source = open_source(cfg, tmp_path, progress=False, stop=StopFlag())
    assert isinstance(source, Windows)
    windows = tmp_path / "_activations" / f"{source.id}.windows"
    with source.stream(1, ROWS, CPU) as alone:
        expected = [alone.batch(step).clone() for step in range(6)]
    assert not producers(tmp_path) and not list(windows.glob("*/"))

    first, second = source.stream(0, ROWS, CPU), source.stream(1, ROWS, CPU)
    with second:
        with first:
            first.batch(0)
            assert torch.equal(second.batch(0), expected[0])
            assert torch.equal(second.batch(1), expected[1])
            (process,), (slot,) = producers(tmp_path), windows.glob("*/")
            time.sleep(0.5)  # enough for the small window 2, if `first` were not at 0
            assert {path.name for path in slot.glob("window-*")} <= {"window-000000", "window-000001"}
        # the training that started the process has left it to the other
        assert process.is_running()
        assert torch.equal(second.batch(2), expected[2])
        process.send_signal(signal.SIGKILL)
        psutil.wait_procs([process], timeout=30)
        for step in (3, 4, 5):  # window 3 may have been there
            assert torch.equal(second.batch(step), expected[step])
        (other,) = producers(tmp_path)
        assert other.pid != process.pid
    assert not producers(tmp_path) and not list(windows.glob("*/"))


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_of_their_own_give_the_rows_of_a_process(models_on_disk: dict[str, Path], tmp_path: Path) -> None:
    """Also after a kill. A window has two units, one for each rank."""
    text, whole, ranks = (tmp_path / name for name in ("text", "whole", "ranks"))
    text.mkdir()
    for number in range(100):
        (text / f"{number}.txt").write_text(" ".join(f"w{(number + place * place) % 90}" for place in range(800)))
    sizes = {"activations.tokens": 80_000, "activations.window_tokens": 40_000, "train.tokens": 40_960}
    small = [word for word in words(models_on_disk, text, whole) if word.split("=")[0] not in sizes]
    small += [f"{name}={size}" for name, size in sizes.items()]
    assert start(small).wait(timeout=300) == 0
    in_ranks = [word.replace(str(whole), str(ranks)) for word in small] + ["mesh.lm=2"]
    launch = start(in_ranks)
    end = time.monotonic() + 300
    while not 8 < steps(ranks) < 160 and launch.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    launch.kill()
    launch.wait()
    assert steps(ranks) < 160, "killed before the end"
    assert len(list(ranks.glob("_activations/*.windows/*/window-000000/unit-*"))) == 2
    assert start(in_ranks).wait(timeout=300) == 0
    (expected,), (found,) = (list(out.glob("t/*/sae/sae.safetensors")) for out in (whole, ranks))
    assert found.read_bytes() == expected.read_bytes()
    assert not list(ranks.glob("_activations/*.windows/*/"))


def test_ranks_without_windows_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from harness.launch import main

    assert main(["activations=synthetic", "mesh.lm=1", "sae=topk", "sae.n_latents=32", "sae.k=2", "--dry-run"]) == 2
    assert "mesh.lm=1 ranks compute windows; set activations.keep=window" in capsys.readouterr().err
