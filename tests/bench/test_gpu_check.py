"""`python -m harness.bench.gpu`, as far as a machine without a GPU can run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from harness.bench.gpu.__main__ import GOALS, LIMITS_S, Figures, judged, time_limit, wrong


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    whole = [sys.executable, "-m", "harness.bench.gpu", *arguments]
    return subprocess.run(whole, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_the_dry_run_does_every_check(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = command("--dry", "--minutes", "40", "--out", str(tmp_path))  # the interpreter is slow beside other tests
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["errors"] == {}
    assert set(results["seconds"]) == set(LIMITS_S)
    assert results["kernels"]["sizes"]["failed"] == []
    assert results["loop"]["graph_equals_eager"]
    assert results["sweep"] | {"resumed_s": 0} == {
        "killed_on_the_way": True,
        "exit_code": 0,
        "resumed_s": 0,
        "results": 2,
    }
    assert {"S1", "S2", "S1-131072", "S3-E8", "S3-E32"} <= set(results["shapes"])


ABSENT = ("pandas", "transformers", "datasets", "matplotlib", "jinja2", "wandb", "lmfit", "gguf", "accelerate")
"""Packages of the project that docs/performance.md does not list for a bare machine."""


@pytest.mark.slow
def test_a_bare_machine_needs_only_the_packages_that_are_listed(tmp_path: Path) -> None:
    launch = ["activations=synthetic", "sae=topk", "sae.n_latents=64", "sae.k=4", "train.tokens=2000", "tracker=none"]
    code = (
        "import runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name.partition('.')[0] in {ABSENT!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import harness.bench.gpu.checks\n"
        f"sys.argv = {['harness.launch', *launch, f'out={tmp_path}', 'sweep=s']!r}\n"
        "runpy.run_module('harness.launch', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(list(tmp_path.glob("s/*/result.json"))) == 1, done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_wrong_requests_are_one_line(tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "none"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no GPU" in done.stderr and "--dry" in done.stderr
    assert not (tmp_path / "none").exists()
    done = command("--checks", "shapes,speed")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "unknown speed; choose from device" in done.stderr
    for wrong_one in (["--minutes", "-1"], ["--minutes", "nan"], ["--out", "/proc/none"]):
        done = command("--dry", "--checks", "device", *wrong_one)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(" ".join(wrong_one))


def test_every_figure_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    figures = Figures(path)
    figures.record("device.copy_bytes_per_s", 4e12)
    figures.record("selection.S1.gaussian", {"bytes_per_s": 2e12})
    results = json.loads(path.read_text())
    assert results["selection"]["S1"]["gaussian"]["pct_of_copy"] == 50


def test_goals_are_reached_missed_or_not_measured() -> None:
    results = {"shapes": {"S1": {"pct_of_floor": 60.4, "auxk_over_fastest": 1.8}}}
    rows = {figure: (measured, reached) for figure, _, measured, reached in judged(results)}
    assert len(rows) == len(GOALS)
    assert rows["share of floor S1, %"] == ("60.40", "reached")
    assert rows["AuxK, 5 % dead, step ratio S1"] == ("1.80", "missed")
    assert rows["over sparsify"] == ("-", "not measured")


def test_what_is_wrong_is_named() -> None:
    fine = {"errors": {}, "kernels": {"sizes": {"failed": []}}, "sweep": {"exit_code": 0}, "loop": {}}
    assert wrong(fine) == []
    broken = fine | {"errors": {"shapes": "TimeoutError: stopped after 1 s"}, "loop": {"graph_equals_eager": False}}
    assert wrong(broken) == ["shapes: TimeoutError: stopped after 1 s", "loop: graph_equals_eager is false"]


def test_a_check_is_stopped_in_time() -> None:
    with pytest.raises(TimeoutError, match="stopped after"), time_limit(0.05):
        time.sleep(10)


def test_checks_have_functions() -> None:
    from harness.bench.gpu import checks

    assert all(callable(getattr(checks, name)) for name in LIMITS_S)
