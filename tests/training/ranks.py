"""Ranks that start in milliseconds, and what strikes them: a signal at a chosen moment."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.config import Config, to_container

SWITCH = {"sae__architecture": "switch", "sae__n_experts": 4, "sae__balance_weight": 0.1}

PRELOAD = [
    *("harness.train", "harness.ops.cpu", "harness.activations.lm.model", "tests.training.ranks"),
    *("transformers.models.bert.modeling_bert", "transformers.models.auto.modeling_auto"),
]


class Place(NamedTuple):
    """A function, as `module:attribute`, and whether its calls are waited for."""

    function: str
    after: bool = False


STEP = Place("harness.training.state:TrainState.train_step", after=True)
EVALUATION = Place("harness.training.evaluate:_fill")
PLANNING = Place("harness.activations.open:prepare")
FORWARD = Place("harness.activations.lm.model:HookedModel.all_activations")
ASSEMBLY = Place("harness.activations.store.shards:write_tensors_atomic")
ASSEMBLED = Place("harness.activations.open:remove_scratch")
SAVE = {
    "begun": Place("harness.record.checkpoint:_prepare", after=True),
    "while tensors are written": Place("harness.record.checkpoint:HuggingFaceStorageWriter.write_data", after=True),
    "without its marker": Place("harness.record.checkpoint:_commit"),
    "not yet in place": Place("harness.record.checkpoint:write_json_atomic", after=True),
    "in place beside the older one": Place("harness.record.checkpoint:fsync_directory"),
}


class Strike(NamedTuple):
    """Signals that a rank sends to itself when it comes to a place for the `call`-th time."""

    place: Place
    call: int
    signals: tuple[int, ...]
    ranks: tuple[int, ...] = (0,)


def _arm(strike: Strike) -> None:
    module, _, path = strike.place.function.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), 0

    @functools.wraps(original)
    def struck(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*arguments, **options) if strike.place.after else None
        if calls == strike.call:
            for number in strike.signals:
                os.kill(os.getpid(), number)
        return result if strike.place.after else original(*arguments, **options)

    setattr(owner, name, struck)


def _one_rank(run_dir: str, rank: int, world: int, port: int, strike: Strike | None, unit_tokens: int) -> None:
    """What a rank's process does: exactly `python -m harness.train run_dir`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.setsid()
    with Path(run_dir, f"rank{rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        torch.set_num_threads(1)
        if unit_tokens:
            from harness.activations.store import harvest

            harvest.UNIT_TOKENS = unit_tokens
        if strike is not None and rank in strike.ranks:
            _arm(strike)
        from harness.train import main

        raise SystemExit(main([run_dir]))


@pytest.fixture(scope="session")
def processes() -> Iterator[ForkServerContext]:
    """A server whose imports are done once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    yield context


def prepare(run_dir: Path, config: Config, dp: int = 1, shard: int = 1) -> Path:
    """Freeze a run, or an existing one for another mesh."""
    config.mesh.dp, config.mesh.shard = dp, shard
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(to_container(config)))
    return run_dir


def start(
    context: ForkServerContext, run_dir: Path, world: int, strike: Strike | None = None, unit_tokens: int = 0
) -> list[Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [(str(run_dir), rank, world, port, strike, unit_tokens) for rank in range(world)]
    ranks = [context.Process(target=_one_rank, args=given) for given in arguments]
    for rank in ranks:
        rank.start()
    return ranks


def join(ranks: Sequence[Any]) -> list[int]:
    """Exit codes, once all have ended."""
    codes = []
    for rank in ranks:
        rank.join(timeout=60)
        assert rank.exitcode is not None, "a rank outlives the others"
        codes.append(rank.exitcode)
    return codes


def killed(ranks: Sequence[Any], struck: Sequence[int], everyone: bool) -> None:
    """Wait until the struck ranks have killed themselves, with `everyone` kill the others too, and see all end."""
    for rank in struck:
        ranks[rank].join(timeout=60)
        assert ranks[rank].exitcode == -signal.SIGKILL, f"rank {rank} ended with {ranks[rank].exitcode}"
    if everyone:
        for rank in ranks:
            rank.kill()
    assert 0 not in join(ranks)


def logs(run_dir: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(run_dir.glob("rank*.log")))


def same_weights(left: Path, right: Path) -> bool:
    a, b = (load_file(run / "sae" / "sae.safetensors") for run in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
