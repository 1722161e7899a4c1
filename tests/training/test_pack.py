"""Runs that are trained together are the runs that are trained alone; only their checkpoints stand or fall together."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config import Config
from harness.process.signals import Interrupted, StopFlag
from harness.progress import Progress
from harness.record.job import Job
from harness.record.run import frozen_run
from harness.training.run import train_job
from tests.training.members import run, small_config, source_of
from tests.training.test_run import lines_without_clock, weights

SWITCH = {"sae__architecture": "switch", "sae__n_experts": 4, "sae__balance_weight": 0.1}
CELLS = {
    "small": small_config(),
    "wide": small_config(sae__n_latents=128, train__seed=3, train__clip_norm=0.5),
    "switch": small_config(**SWITCH, train__ema=0.9),
    "short": small_config(train__tokens=64 * 37),
}


def together(root: Path, cells: dict[str, Config], stop: StopFlag | None = None) -> dict[str, dict[str, Any]]:
    """Train those of `cells` that have no result yet as one pack."""
    runs = []
    for name, config in cells.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        if not (root / name / "result.json").exists():
            runs.append(frozen_run(root / name, config))
    (root / "pack").mkdir(exist_ok=True)
    source = source_of(next(iter(cells.values())))
    train_job(Job(tuple(runs), root / "pack"), source, stop or StopFlag(), Progress(io.StringIO()))
    return {name: json.loads((root / name / "result.json").read_text()) for name in cells}


def assert_equal_runs(left: Path, right: Path) -> None:
    """Weights bit by bit, and every line of the record but for what a clock says."""
    left_weights, right_weights = weights(left), weights(right)
    assert all(torch.equal(left_weights[name], right_weights[name]) for name in left_weights | right_weights)
    assert lines_without_clock(left) == lines_without_clock(right)


class StopAtStep(StopFlag):
    """Requested from the n-th look on."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    @property
    def requested(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    for name, config in CELLS.items():
        assert run(root / name, config)["status"] == "done"
    return root


def test_trained_together_equals_trained_alone(alone: Path, tmp_path: Path) -> None:
    results = together(tmp_path, CELLS)
    for name, result in results.items():
        assert_equal_runs(alone / name, tmp_path / name)
        assert (result["status"], result["trained_together"]) == ("done", 4)
    assert results["short"]["steps"] == 37
    assert not (tmp_path / "pack" / "checkpoints").exists()


@pytest.mark.parametrize("looks", [5, 20, 60, 90])
def test_an_interrupted_pack_goes_on_bit_for_bit(alone: Path, tmp_path: Path, looks: int) -> None:
    """Also across the step at which the short run ends."""
    with pytest.raises(Interrupted):
        together(tmp_path, CELLS, StopAtStep(looks))
    (checkpoint,) = (tmp_path / "pack" / "checkpoints").glob("step-*")
    marker = json.loads((checkpoint / "marker.json").read_text())
    assert set(marker["extra"]) == {n for n in CELLS if not (tmp_path / n / "result.json").exists()}
    together(tmp_path, CELLS)
    for name in CELLS:
        assert_equal_runs(alone / name, tmp_path / name)


def test_a_run_that_diverges_leaves_and_the_others_go_on(alone: Path, tmp_path: Path) -> None:
    cells = {"small": CELLS["small"], "hot": small_config(train__lr=1e30), "wide": CELLS["wide"]}
    results = together(tmp_path, cells)
    assert {name: result["status"] for name, result in results.items()} == {
        "small": "done",
        "hot": "diverged",
        "wide": "done",
    }
    for name in ("small", "wide"):
        assert_equal_runs(alone / name, tmp_path / name)


def test_a_checkpoint_holds_runs_at_one_step_even_if_some_have_ended_since(alone: Path, tmp_path: Path) -> None:
    """The last save before a kill still has the run that ended after it: it is not trained again."""
    cells = {name: CELLS[name] for name in ("small", "short")}
    with pytest.raises(Interrupted):
        together(tmp_path, cells, StopAtStep(15))
    ended = (alone / "short" / "result.json").read_text().replace('"attempts": 1', '"attempts": 7')
    (tmp_path / "short" / "result.json").write_text(ended)
    assert together(tmp_path, cells)["short"]["attempts"] == 7
    assert_equal_runs(alone / "small", tmp_path / "small")
