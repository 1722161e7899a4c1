"""`--rehearse`: every shape of a grid takes a few steps where its runs will train, and nothing of it stays.

A shape is what decides whether a job can train: architecture, sizes, mesh, pack, place. Seeds, learning rates and
budgets are left out. Each takes its first steps, is evaluated, saved, stopped, started again from its save, and ends
with its final weights; as in a real run, but that all latents that were silent for a step count as dead, so that the
largest AuxK is tried too.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.activations.store.paths import is_complete, store_name, store_path, store_root
from harness.budget import EVALUATION_BATCH
from harness.cell_names import cell_names
from harness.config import ActivationsConfig, Config, TrackerConfig, run_id, to_container
from harness.cost.estimate import Estimates, estimate
from harness.cost.jobs import cut_into_jobs
from harness.errors import FAILED, INTERRUPTED, UserError
from harness.places import joined
from harness.places.rehearsal import STEPS, rehearse_here, unfit
from harness.process.signals import Interrupted, stop_on_signals
from harness.record.job import Job, job_of
from harness.record.peers import groups_of
from harness.record.result import read_result, unfinished
from harness.record.run import Run, Store
from harness.record.rundir import run_directory
from harness.sweep.intent import make_writable
from harness.sweep.request import Request, plan_runs, requested_cells
from harness.terminal import counted, duration, say, si, table

ROWS = 8192
"""Training rows that are computed where the activations do not exist yet."""

BLANK = {"seed": 0, "lr": 0.0, "lr_factor": 1.0, "warmup_tokens": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999}
"""Settings of `train` in which jobs of one shape may differ, beside the budget."""


@dataclass(frozen=True)
class Rehearsal:
    job: Job
    """The short job, in a temporary directory."""
    planned: Job
    """The first of the jobs that it stands for."""
    alike: int
    """How many there are."""


def rehearse(request: Request) -> int:
    """Try every shape of the unfinished runs; print a table. Returns the exit code: 1 if one failed, 75 if stopped.

    Raises `UserError` for a wrong request.
    """
    if joined.joined_task() is not None:
        raise UserError("--rehearse starts its own ranks or jobs: run it outside srun")
    runs = unfinished(plan_runs(requested_cells(request), dry_run=False))
    estimates = estimate(runs)
    shapes: dict[str, list[Job]] = {}
    for job in cut_into_jobs(runs, estimates):
        shapes.setdefault(_shape(job), []).append(job)
    if not shapes:
        say("nothing to rehearse: every cell has ended")
        return 0
    try:
        with _scratch(runs) as scratch:
            rehearsals = [
                Rehearsal(_short_job(jobs[0], scratch[jobs[0].config.out]), jobs[0], len(jobs))
                for jobs in shapes.values()
            ]
            slurm = runs[0].config.cluster.name == "slurm"
            outcomes = _on_slurm(rehearsals) if slurm else _here(rehearsals)
            outcomes = [why or unfit(each.job) for each, why in zip(rehearsals, outcomes, strict=True)]
            print(_table(rehearsals, outcomes, estimates))
    except (Interrupted, KeyboardInterrupt):
        say("stopped; nothing of the rehearsal was kept")
        return INTERRUPTED
    failed = sum(map(bool, outcomes))
    say(f"{len(outcomes) - failed} of {counted(len(outcomes), 'shape')} can train")
    return FAILED if failed else 0


@contextmanager
def _scratch(runs: Sequence[Run]) -> Iterator[dict[str, Path]]:
    """A temporary directory inside every output directory: the same disk, the same quota."""
    with ExitStack() as stack:
        directories = {}
        for out in dict.fromkeys(run.config.out for run in runs):
            make_writable(Path(out))
            directories[out] = Path(tempfile.mkdtemp(prefix="_rehearsal-", dir=out))
            stack.callback(shutil.rmtree, directories[out], ignore_errors=True)
        yield directories


def _shape(job: Job) -> str:
    configs = []
    for group in groups_of(job.runs):
        peers = list(range(len(group)))
        configs += [_short_config(run, Path(), place, peers) for run, place in zip(group, peers, strict=True)]
    return repr(sorted(map(repr, configs)))


def _short_job(job: Job, scratch: Path) -> Job:
    """The job with a budget of a few steps, in `scratch`."""
    runs, places = [], itertools.count()
    for group in groups_of(job.runs):
        # their names must differ in what is left of their settings
        peers = [next(places) for _ in group]
        for run, place in zip(group, peers, strict=True):
            config = _short_config(run, scratch, place, peers)
            store = Store(store_name(config.activations), run.store.d_model)
            config = dataclasses.replace(config, activations=dataclasses.replace(config.activations, store=store.id))
            runs.append(Run(config, run_directory(config, run_id(config, store.id)), store))
    return job_of(runs)


def _short_config(run: Run, scratch: Path, seed: int, peers: list[int]) -> Config:
    """`peers`: the seeds of the runs of its group, `seed` among them."""
    config, batch = run.config, run.config.train.batch_tokens
    seeds = {"seed": seed, "mfr_seeds": peers, "mfr_weight": config.train.mfr_weight if len(peers) > 1 else 0.0}
    budget: dict[str, Any] = {"tokens": float(STEPS * batch), "flops": 0.0, "until": "budget"}
    records: dict[str, Any] = {"eval_points": 2, "log_every_steps": 1, "checkpoint_every_s": 0.0}
    return dataclasses.replace(
        config,
        # all that was silent for a step is dead
        sae=dataclasses.replace(config.sae, dead_after_tokens=float(batch), aux_refresh_steps=1),
        activations=_few_rows(config.activations, Path(config.out), batch),
        train=dataclasses.replace(config.train, **{**BLANK, **budget, **records, **seeds}),
        stream=dataclasses.replace(config.stream, seed=0),
        tracker=TrackerConfig(name="none"),
        out=str(scratch),
    )


def _few_rows(config: ActivationsConfig, out: Path, batch: int) -> ActivationsConfig:
    """The store that exists, else one of the same recipe with few rows; windows are always small ones."""
    if config.kind == "synthetic":
        return config
    if config.keep == "store" and is_complete(store_path(config, out)):
        return dataclasses.replace(config, dir=str(store_root(config, out).absolute()))
    window = float(max(ROWS, batch)) if config.keep == "window" else 0.0
    few = {"tokens": 2 * window or min(config.tokens, ROWS), "window_tokens": window}
    few["heldout_tokens"] = min(config.heldout_tokens, EVALUATION_BATCH)
    return dataclasses.replace(config, **few, store="", dir="")


def _here(rehearsals: Sequence[Rehearsal]) -> list[str]:
    outcomes = []
    with stop_on_signals() as stop:
        for number, each in enumerate(rehearsals, start=1):
            begun = time.monotonic()
            outcomes.append(rehearse_here(each.job, stop))
            ending = "failed" if outcomes[-1] else "done"
            say(f"{number} of {len(rehearsals)}: {ending} in {duration(time.monotonic() - begun)}")
    return outcomes


def _on_slurm(rehearsals: Sequence[Rehearsal]) -> list[str]:
    from harness.places.slurm.rehearse import rehearse_on_slurm

    return rehearse_on_slurm([each.job for each in rehearsals])


def _table(rehearsals: Sequence[Rehearsal], outcomes: Sequence[str], estimates: Estimates) -> str:
    names = cell_names([to_container(each.job.config) for each in rehearsals])
    rows = []
    for name, each, why in zip(names, rehearsals, outcomes, strict=True):
        mesh, planned = each.job.config.mesh, estimates.job_memory(each.planned)
        peaks = [(read_result(run.run_dir) or {}).get("peak_memory_bytes") for run in each.job.runs]
        took = max((peak for peak in peaks if peak), default=None)
        rows.append(
            [
                name,
                f"{mesh.dp} × {mesh.shard}",
                str(len(each.job.runs)),
                str(each.alike),
                "?" if planned is None else f"{si(planned)}B",
                "?" if took is None else f"{si(took)}B",
                "failed: " + why if why else "done",
            ]
        )
    headings = ["shape", "mesh", "cells", "jobs", "memory planned", "took", "outcome"]
    return table(headings, rows, left=("outcome",), optional=("jobs", "memory planned"))
