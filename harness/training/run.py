"""From frozen configurations to results: resume or begin, train, and leave complete run directories."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from harness.activations.source import ActivationSource
from harness.activations.store.values import note_on_outliers
from harness.mirror.follow import follow
from harness.ops import Ops, choose_ops
from harness.parallel import Shards, Solo
from harness.process.device import pick_device
from harness.process.memory import reset_peak
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.progress import Progress
from harness.record import names
from harness.record.checkpoint import Checkpoint, find_checkpoint, remove_checkpoints
from harness.record.job import Job
from harness.record.metrics import MetricsFile, NullMetrics, cut_back
from harness.record.notes import add_note, read_notes
from harness.record.provenance import now
from harness.record.run import Run
from harness.schema import fields
from harness.training import end_to_end
from harness.training.checkpoints import Checkpoints
from harness.training.loop import train
from harness.training.member import COUNTERS, Member
from harness.training.state import make_state

log = logging.getLogger(__name__)


def train_job(
    job: Job, source: ActivationSource, stop: StopFlag, progress: Progress, shards: Shards | None = None
) -> None:
    """Train the runs of a job together, to their `result.json`s.

    They go on from a good checkpoint in the job's home if there is one. Called by every rank of `shards` (default: one
    process); the first one writes. Raises `Interrupted` after saving when `stop` is set. Any other exception is raised
    unchanged, and leaves no result in runs that have not ended.
    """
    config, shards = job.config, shards or Solo()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    reset_peak()
    if config.train.objective in end_to_end.WEIGHTS:
        source = end_to_end.whole_contexts(config, source, device)
    counters = fields({run.run_id: COUNTERS for run in job.runs})
    checkpoint = find_checkpoint(job.checkpoints, job.home.name, shards, counters)
    if checkpoint is not None:
        for line in checkpoint.refused:
            log.warning(line)
            for run in job.runs:
                add_note(run.run_dir, line)
        log.info("goes on at step %d", checkpoint.step)
        if checkpoint.directory is None:
            checkpoint = None
    outliers = note_on_outliers(source.description)
    if shards.rank == 0 and outliers is not None:
        for run in job.runs:
            if not any(line.endswith(outliers) for line in read_notes(run.run_dir)):
                add_note(run.run_dir, outliers)
    runtime = Runtime(device, shards, _kernels(job, checkpoint, device), stop)
    started = now()
    with ExitStack() as stack:
        members = [
            stack.enter_context(_opened(run, source, progress, runtime, checkpoint, len(job.runs))) for run in job.runs
        ]
        checkpoints = Checkpoints(job.checkpoints, members, runtime)
        if checkpoint is not None:
            checkpoints.restore(members, checkpoint)
        longest = max(members, key=lambda member: member.state.last).state
        progress.start(job.home.name, longest.last * config.train.batch_tokens, longest.tokens)
        try:
            train(members, checkpoints, runtime, started)
        finally:
            progress.finish("")
    if shards.rank == 0 and not config.train.keep_checkpoints:
        remove_checkpoints(job.checkpoints)


def _kernels(job: Job, checkpoint: Checkpoint | None, device: torch.device) -> Ops:
    """The kernels that are asked for; with `auto` those of the checkpoint, so that the run ends with the same bits."""
    requested = job.config.ops
    if checkpoint is None:
        return choose_ops(requested, device)
    pinned = checkpoint.extra[job.runs[0].run_id]["ops"]
    if requested in ("auto", pinned):
        try:
            return choose_ops(pinned, device)
        except ValueError as problem:
            raise ValueError(
                f"the checkpoint was made with ops={pinned}, which does not run here ({problem}); go on where it does, "
                f"or with ops=reference (equal to rounding, not to the bit)"
            ) from None
    log.warning("goes on with ops=%s, begun with ops=%s: equal to rounding, not to the bit", requested, pinned)
    return choose_ops(requested, device)


@contextmanager
def _opened(
    run: Run,
    source: ActivationSource,
    progress: Progress,
    runtime: Runtime,
    checkpoint: Checkpoint | None,
    together: int,
) -> Iterator[Member]:
    """The member at step 0, its record cut back to the checkpoint, so that no step appears twice in it."""
    state, metrics = make_state(run.config, source, runtime), NullMetrics()
    with ExitStack() as stack:
        if runtime.shards.rank == 0:
            written = 0 if checkpoint is None else checkpoint.extra[run.run_id]["metrics"]
            cut_back(run.run_dir / names.METRICS, written)
            follow(run.run_dir, run.config)
            metrics = stack.enter_context(MetricsFile(run.run_dir / names.METRICS))
        yield Member(run, source, state, metrics, progress, together)
