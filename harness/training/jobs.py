"""One rank of one or several jobs: from their frozen directories to their results."""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from harness.activations.open import open_source
from harness.activations.store.paths import is_complete, store_name
from harness.activations.window.lm_ranks import compute_windows, tell_end
from harness.errors import UserError
from harness.parallel import Shards
from harness.parallel.mesh import meet_all, mesh
from harness.parallel.notices import Notices
from harness.process.device import pick_device
from harness.process.rank import ranks_from_environment, wait_for_ranks
from harness.process.signals import Interrupted, StopFlag, stop_on_signals
from harness.process.together import together
from harness.progress import Progress, own_progress
from harness.record.attempt import END_TIME, attempt, attempt_dirs, claimed, write_ended, write_provenance
from harness.record.job import Job, read_job
from harness.record.result import read_result
from harness.record.rundir import attempts, other_hooks, saved_step
from harness.training.run import train_job


def train_jobs(
    homes: Sequence[Path],
    store_dir: str = "",
    *,
    claim_here: bool = True,
    stop_after: int = 0,
    on_ended: Callable[[Job], None] = lambda job: None,
) -> None:
    """Train jobs of one mesh one after the other, as the rank that this process is.

    `store_dir` is a node-local copy to read the store from; without `claim_here` the process that started this one
    holds the claims. With `stop_after` a job stops once it has done so many steps, as if somebody had asked it to;
    several ranks agree on it one step later. `on_ended` is called with each job that has ended. Raises `Interrupted`,
    and `UserError` for jobs of different meshes.
    """
    ranks = ranks_from_environment()
    jobs = [read_job(home) for home in homes]
    config = jobs[0].config
    for job in jobs:
        if (other := job.config.mesh) != config.mesh:
            raise UserError(f"{job.home} needs another mesh ({other.dp} × {other.shard}) than {jobs[0].home}")
    device = pick_device(config.train.device, ranks.local_rank)
    deadline = float(os.environ[END_TIME]) if END_TIME in os.environ else None
    with ExitStack() as stack:
        stop = stack.enter_context(stop_on_signals(deadline, config.cluster.lead_s))
        stop.after_steps = stop_after
        shape, on_wait, store, notices = config.mesh, wait_for_ranks(stop), None, None
        if shape.lm:
            store = meet_all(ranks, shape.dp, shape.shard, shape.lm, on_wait)
            notices = Notices(store, shape.lm)
            if ranks.rank >= shape.training_ranks:
                compute_windows(notices, ranks.rank - shape.training_ranks, device)
                return
        shards = stack.enter_context(mesh(shape.dp, shape.shard, device, ranks, store=store, on_wait=on_wait))
        if notices is not None and shards.rank == 0:
            stack.callback(tell_end, notices)
        for job in jobs:
            _train_claimed(job, store_dir, stop, shards, claim_here, notices)
            on_ended(job)


def _train_claimed(
    job: Job, store_dir: str, stop: StopFlag, shards: Shards, claim_here: bool, notices: Notices | None
) -> None:
    writer = shards.rank == 0
    with ExitStack() as stack:
        with together(shards):
            if writer and claim_here:
                stack.enter_context(claimed(job.run_dirs))
        # one rank decides: on a network file system the others may see less
        missing = torch.tensor([int(writer and read_result(run_dir) is None) for run_dir in job.run_dirs])
        missing = shards.sum_(missing, "all", "scalars").tolist()
        unfinished = Job(tuple(run for run, wanted in zip(job.runs, missing, strict=True) if wanted), job.home)
        if not unfinished.runs:
            return
        numbers = {run_dir: max(1, attempts(run_dir)) for run_dir in unfinished.run_dirs}
        if writer and claim_here:
            numbers = stack.enter_context(attempt(job.home, unfinished.run_dirs)).numbers
        try:
            _train_unfinished(unfinished, store_dir, stop, shards, claim_here, notices)
        except Interrupted:
            if writer:
                step = saved_step(job.home)
                write_ended(attempt_dirs(numbers), outcome="saved", reason=stop.reason, step=step, requeued=False)
            raise


def _train_unfinished(
    job: Job, store_dir: str, stop: StopFlag, shards: Shards, claim_here: bool, notices: Notices | None
) -> None:
    writer, config = shards.rank == 0, job.config
    activations = config.activations
    # windows are written while they are read, for all nodes
    if store_dir and activations.keep == "store" and is_complete(Path(store_dir) / store_name(activations)):
        activations = dataclasses.replace(activations, dir=store_dir)
    others = other_hooks(job.home, job.config)
    source = open_source(
        activations, Path(config.out), progress=writer, stop=stop, shards=shards, others=others, notices=notices
    )
    if writer and claim_here:
        mesh_shape = {"dp": config.mesh.dp, "shard": config.mesh.shard}
        write_provenance(job.run_dirs, store_id=source.id, ops=config.ops, mesh=mesh_shape)
    train_job(job, source, stop, own_progress() if writer else Progress(io.StringIO()), shards)
