"""`kill -9` at random moments, in steps, saves and evaluations: nothing is lost, and the weights are those of a run
that nobody disturbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.config import to_container
from harness.record import metrics
from tests.train.cells import small_config

SWITCH = {"sae__architecture": "switch", "sae__n_experts": 4, "sae__balance_weight": 0.1}
STEPS = 400


def one_rank(run_dir: str, rank: int, world: int, port: int) -> None:
    """What a rank's process does: exactly `python -m harness.train run_dir`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.setsid()
    with Path(run_dir, f"rank{rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)
        from harness.train.__main__ import main

        raise SystemExit(main([run_dir]))


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Ranks that start in milliseconds: their imports are done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.train.__main__", "harness.ops.cpu", "tests.train.test_kills"])
    yield context


def prepare(directory: Path, world: int, changes: dict[str, Any]) -> Path:
    config = small_config(train__tokens=64 * STEPS, train__checkpoint_every_steps=7, train__eval_points=20, **changes)
    config.mesh.shard = world
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(to_container(config)))
    return directory


def start(context: ForkServerContext, run_dir: Path, world: int) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=one_rank, args=(str(run_dir), rank, world, port)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def wait_for_a_new_checkpoint(run_dir: Path, ranks: list[Any]) -> None:
    """Return when the ranks have saved once more, or are all gone."""

    def names() -> set[str]:
        return {path.name for path in (run_dir / "checkpoints").glob("step-*")}

    before, end = names(), time.monotonic() + 60
    while names() <= before and time.monotonic() < end and any(rank.is_alive() for rank in ranks):
        time.sleep(0.002)


def join(ranks: list[Any]) -> list[int | None]:
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode is not None, "a rank outlives the others"
    return [rank.exitcode for rank in ranks]


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
    whole = prepare(tmp_path / "a" / "run", world, changes)
    assert join(start(processes, whole, world)) == [0] * world, (whole / "rank0.log").read_text()[-2000:]

    cut, moments = prepare(tmp_path / "b" / "run", world, changes), random.Random(world)
    for kill in range(kills):
        ranks = start(processes, cut, world)
        if kill:
            wait_for_a_new_checkpoint(cut, ranks)
            time.sleep(moments.uniform(0, 0.05))
        else:
            time.sleep(moments.uniform(0, 1))
        victims = ranks if moments.random() < 0.5 else [moments.choice(ranks)]
        for victim in victims:
            assert victim.is_alive(), "the run was over before its time"
            os.kill(victim.pid, signal.SIGKILL)
        assert 0 not in join(ranks)
    assert join(start(processes, cut, world)) == [0] * world, (cut / "rank0.log").read_text()[-2000:]
    assert json.loads((cut / "result.json").read_text())["status"] == "done"
    left, right = (load_file(run / "sae" / "sae.safetensors") for run in (whole, cut))
    assert all(torch.equal(left[name], right[name]) for name in left)
    steps = [[line["step"] for line in metrics.read(run / "metrics.jsonl")] for run in (whole, cut)]
    assert steps[0] == steps[1]
