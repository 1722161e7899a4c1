"""One rank of one job: a run, or a pack of runs that share a stream, from its frozen directory to its results."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from harness.activations.open import open_source
from harness.activations.store.identity import is_complete, store_name
from harness.errors import UserError
from harness.parallel import Shards
from harness.parallel.mesh import mesh, ranks_from_environment
from harness.process.signals import Interrupted, StopFlag, stop_on_signals
from harness.process.together import together
from harness.record import rundir
from harness.record.attempt import END_TIME, attempt, attempt_dirs, claimed, write_ended, write_provenance
from harness.sweep.pack import Target, read_target
from harness.terminal import Progress
from harness.training.run import Start, pick_device, run_cells


def train_jobs(
    homes: Sequence[Path],
    store_dir: str = "",
    *,
    claim_here: bool = True,
    told: Callable[[Target], None] = lambda target: None,
) -> None:
    """Train jobs of one mesh one after the other, as the rank that this process is; `told` hears of each that ended.

    Raises `Interrupted`.
    """
    ranks = ranks_from_environment()
    targets = [read_target(home) for home in homes]
    first = targets[0].configs()[0]
    for target in targets:
        if (other := target.configs()[0].mesh) != first.mesh:
            raise UserError(f"{target.home} wants another mesh ({other.dp} × {other.shard}) than {targets[0].home}")
    device = pick_device(first.train.device, ranks.local_rank)
    deadline = float(os.environ[END_TIME]) if END_TIME in os.environ else None
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals(deadline, first.cluster.lead_s))
        shards = stack.enter_context(mesh(first.mesh.dp, first.mesh.shard, device))
        for target in targets:
            _train(target, store_dir, stop, shards, claim_here)
            told(target)


def _train(target: Target, store_dir: str, stop: StopFlag, shards: Shards, claim_here: bool) -> None:
    writer = shards.rank == 0
    with ExitStack() as stack:
        with together(shards):
            if writer and claim_here:
                stack.enter_context(claimed(target.run_dirs))
        # decided by one rank: on a network file system the others may see less
        todo = torch.tensor([int(writer and rundir.read_result(path) is None) for path in target.run_dirs])
        todo = shards.sum_(todo, "all", "scalars").tolist()
        unfinished = [path for path, wanted in zip(target.run_dirs, todo, strict=True) if wanted]
        if not unfinished:
            return
        numbers = {path: max(1, rundir.attempts(path)) for path in unfinished}
        if writer and claim_here:
            numbers = stack.enter_context(attempt(target.home, unfinished)).numbers
        try:
            _train_unfinished(target, numbers, store_dir, stop, shards, claim_here)
        except Interrupted:
            if writer:
                saved = rundir.saved_step(target.home)
                write_ended(attempt_dirs(numbers), outcome="saved", reason=stop.reason, step=saved, requeued=False)
            raise


def _train_unfinished(
    target: Target, numbers: dict[Path, int], store_dir: str, stop: StopFlag, shards: Shards, claim_here: bool
) -> None:
    writer = shards.rank == 0
    starts = [Start(path, rundir.read_config(path), number) for path, number in numbers.items()]
    config = starts[0].config
    activations = config.activations
    if store_dir and is_complete(Path(store_dir) / store_name(activations)):
        activations = dataclasses.replace(activations, dir=store_dir)
    source = open_source(activations, Path(config.out), progress=writer, stop=stop, shards=shards)
    if writer and claim_here:
        mesh_shape = {"dp": config.mesh.dp, "shard": config.mesh.shard}
        write_provenance(list(numbers), store_id=source.id, ops=config.ops, mesh=mesh_shape)
    progress = Progress(None if writer else io.StringIO())
    run_cells(starts, target.checkpoints, source, stop, progress, shards)
