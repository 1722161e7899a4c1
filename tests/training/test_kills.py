"""`kill -9` at random moments, inside saves, and with another mesh afterwards: nothing is lost, the weights are those
of a run that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from harness.config import Config
from harness.record import metrics
from tests.training.members import small_config
from tests.training.ranks import (
    SAVE,
    STEP,
    SWITCH,
    Strike,
    join,
    killed,
    logs,
    prepare,
    processes,
    same_weights,
    start,
)

__all__ = ["processes"]

KILL = (signal.SIGKILL,)


def config_of(changes: dict[str, Any], steps: int, every: int = 7) -> Config:
    return small_config(train__tokens=64 * steps, train__checkpoint_every_steps=every, train__eval_points=20, **changes)


def wait_for_a_new_checkpoint(run_dir: Path, ranks: list[Any]) -> None:
    """Return when the ranks have saved once more, or are all gone."""

    def names() -> set[str]:
        return {path.name for path in (run_dir / "checkpoints").glob("step-*")}

    before, end = names(), time.monotonic() + 180
    while names() <= before and time.monotonic() < end and any(rank.is_alive() for rank in ranks):
        time.sleep(0.002)


def ends_like(whole: Path, cut: Path) -> None:
    """The same weights bit for bit, the same lines in the record."""
    assert json.loads((cut / "result.json").read_text())["status"] == "done"
    assert same_weights(whole, cut)
    steps = [[line["step"] for line in metrics.read(run / "metrics.jsonl")] for run in (whole, cut)]
    assert steps[0] == steps[1]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("changes", "world", "kills"),
    [({}, 1, 10), (SWITCH, 1, 8), ({}, 2, 7), (SWITCH, 2, 7)],
    ids=["topk-1", "switch-1", "topk-2", "switch-2"],
)
def test_killed_runs_end_with_the_weights_of_undisturbed_ones(
    processes: ForkServerContext, changes: dict[str, Any], world: int, kills: int, tmp_path: Path
) -> None:
    config = config_of(changes, steps=400)
    whole = prepare(tmp_path / "a" / "run", config, shard=world)
    assert join(start(processes, whole, world)) == [0] * world, logs(whole)

    cut, moments = prepare(tmp_path / "b" / "run", config, shard=world), random.Random(world)
    for kill in range(kills):
        ranks = start(processes, cut, world)
        if kill:
            wait_for_a_new_checkpoint(cut, ranks)
            time.sleep(moments.uniform(0, 0.05))
        else:
            time.sleep(moments.uniform(0, 1))
        # ranks that have not met yet wait for one another for half an hour, unless a launcher ends them
        alone = kill and moments.random() < 0.5
        victims = [moments.choice(ranks)] if alone else ranks
        for victim in victims:
            assert victim.is_alive(), "the run was over before its time"
            os.kill(victim.pid, signal.SIGKILL)
        assert 0 not in join(ranks)
    assert join(start(processes, cut, world)) == [0] * world, logs(cut)
    ends_like(whole, cut)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("changes", "world"), [({}, 1), (SWITCH, 1), ({}, 2), (SWITCH, 2)], ids=["topk-1", "switch-1", "topk-2", "switch-2"]
)
def test_killed_in_the_middle_of_a_save(
    processes: ForkServerContext, changes: dict[str, Any], world: int, tmp_path: Path
) -> None:
    config = config_of(changes, steps=120)
    whole = prepare(tmp_path / "a" / "run", config, shard=world)
    assert join(start(processes, whole, world)) == [0] * world, logs(whole)

    cut = prepare(tmp_path / "b" / "run", config, shard=world)
    strikes = [(Strike(place, 2, KILL), len(strike) % 2 == 0) for strike, place in SAVE.items()]
    if world > 1:  # what the other ranks do in a save is write their tensors
        strikes += [(Strike(SAVE["while tensors are written"], 2, KILL, (1,)), everyone) for everyone in (False, True)]
    saved = 0
    for strike, everyone in strikes:
        killed(start(processes, cut, world, strike), strike.ranks, everyone)
        newest = max(path.name for path in (cut / "checkpoints").glob("step-*"))
        assert int(newest.split("-")[1]) >= saved + 7, "the save before was complete"
        saved = int(newest.split("-")[1])
    assert saved < 120
    assert join(start(processes, cut, world)) == [0] * world, logs(cut)
    ends_like(whole, cut)
    assert not (cut / "checkpoints").exists()


AUXK = {"sae__aux_alpha": 1 / 32, "sae__dead_after_tokens": 200}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("changes", [AUXK, AUXK | SWITCH], ids=["topk", "switch"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_a_killed_run_goes_on_with_any_mesh(
    processes: ForkServerContext, changes: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    config = config_of(changes | {"train__precision": precision, "train__ema": 0.9, "train__clip_norm": 0.05}, 200)
    whole = prepare(tmp_path / "a" / "run", config)
    assert join(start(processes, whole, 1)) == [0], logs(whole)

    cut = tmp_path / "b" / "run"
    meshes = [(1, 2), (1, 1), (1, 2), (2, 1), (1, 1)]  # two to one, one to two, two shards to two replicas
    for dp, shard in meshes[:-1]:
        prepare(cut, config, dp, shard)
        ranks = start(processes, cut, dp * shard, Strike(STEP, 45, KILL))
        killed(ranks, (0,), everyone=True)
    prepare(cut, config, *meshes[-1])
    assert join(start(processes, cut, 1)) == [0], logs(cut)

    results = [json.loads((run / "result.json").read_text()) for run in (whole, cut)]
    assert results[1]["fvu"] == pytest.approx(results[0]["fvu"], rel=1e-9 if precision == "fp64" else 1e-4)
    if precision == "fp64":
        a, b = (load_file(run / "sae" / "sae.safetensors") for run in (whole, cut))
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}\n{m}")
