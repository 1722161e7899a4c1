"""SIGTERM, SIGUSR1 and Ctrl-C at chosen moments, to one rank of several: all save and leave with 75, and what comes of
the run is what would have come of it undisturbed."""

from __future__ import annotations

import json
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

from harness.errors import INTERRUPTED
from harness.record import metrics
from tests.training.members import small_config
from tests.training.ranks import EVALUATION, STEP, SWITCH, Strike, join, logs, prepare, processes, same_weights, start

__all__ = ["processes"]

STEPS = 200
SETTINGS = {
    "train__tokens": 64 * STEPS,
    "train__warmup_tokens": 64 * STEPS / 2,
    "train__eval_points": 10,
    "activations__heldout_tokens": 9000,
    "train__eval_rows": 9000,
}


def steps_of(run_dir: Path) -> list[tuple[int, float | None]]:
    return [(line["step"], line.get("fvu")) for line in metrics.read(run_dir / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("changes", "world"), [({}, 1), ({}, 2), (SWITCH, 2)], ids=["topk-1", "topk-2", "switch-2"])
def test_every_signal_at_every_moment_saves_and_leaves_with_75(
    processes: ForkServerContext, changes: dict[str, Any], world: int, tmp_path: Path
) -> None:
    settings = SETTINGS | changes
    whole = prepare(tmp_path / "a" / "run", small_config(**settings), shard=world)
    assert join(start(processes, whole, world)) == [0] * world, logs(whole)

    cut = prepare(tmp_path / "b" / "run", small_config(**settings), shard=world)
    last, everyone = (world - 1,), tuple(range(world))
    strikes = [
        Strike(STEP, 7, (signal.SIGTERM,), last),
        Strike(STEP, 11, (signal.SIGUSR1,), (0,)),
        Strike(EVALUATION, 2, (signal.SIGTERM,), (0,)),
        Strike(EVALUATION, 5, (signal.SIGUSR1,), last),
        Strike(STEP, 9, (signal.SIGINT,), everyone),
        Strike(EVALUATION, 3, (signal.SIGTERM,), everyone),
    ]
    saved = 0
    for strike in strikes:
        codes = join(start(processes, cut, world, strike))
        assert codes == [INTERRUPTED] * world, (strike, codes, logs(cut))
        (marker,) = (cut / "checkpoints").glob("step-*/marker.json")
        step = json.loads(marker.read_text())["step"]
        assert step >= saved and not (cut / "result.json").exists()
        saved = step
    assert 0 < saved < STEPS
    assert join(start(processes, cut, world)) == [0] * world, logs(cut)
    assert same_weights(whole, cut)
    assert steps_of(whole) == steps_of(cut)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing_saved(
    processes: ForkServerContext, world: int, tmp_path: Path
) -> None:
    settings = SETTINGS | {"train__checkpoint_every_steps": 16}
    whole = prepare(tmp_path / "a" / "run", small_config(**settings), shard=world)
    assert join(start(processes, whole, world)) == [0] * world, logs(whole)

    cut = prepare(tmp_path / "b" / "run", small_config(**settings), shard=world)
    twice = (signal.SIGINT, signal.SIGINT)
    for strike, before in ((Strike(STEP, 60, twice), 48), (Strike(EVALUATION, 4, twice), 48)):
        codes = join(start(processes, cut, world, strike))
        assert codes[0] == 128 + signal.SIGINT and 0 not in codes, (codes, logs(cut))
        (marker,) = (cut / "checkpoints").glob("step-*/marker.json")
        assert json.loads(marker.read_text())["step"] >= before  # of before: the second leaves no time to save
    assert join(start(processes, cut, world)) == [0] * world, logs(cut)
    assert same_weights(whole, cut)
    assert steps_of(whole) == steps_of(cut)
