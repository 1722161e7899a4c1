"""Jobs to Slurm arrays. The same command again submits only what has no result and no live job."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.activations.store.paths import is_complete, shares_forwards, store_path
from harness.budget import SAVE_BYTES_PER_S
from harness.config import ClusterConfig, Config, to_container
from harness.cost.estimate import Estimates
from harness.cost.jobs import cut_into_jobs
from harness.cost.limits import time_limit
from harness.errors import UserError
from harness.files import fsync_directory, write_json_atomic, write_text_atomic
from harness.places.slurm import client
from harness.places.slurm.environment import ignored_defaults
from harness.places.slurm.queue import arrays, arrays_root, live_elements
from harness.places.slurm.script import decision_script, job_script
from harness.process.claim import claim
from harness.record.job import Job
from harness.record.provenance import command_line, now
from harness.record.result import FINAL, set_failure_aside
from harness.record.run import Run
from harness.record.rundir import freeze, freeze_other_hooks
from harness.record.state import state_of
from harness.terminal import say

LEAD_MARGIN_S = 60

DECISION = "decision"
"""In the name of a job that decides what a sweep trains next."""


@dataclass(frozen=True)
class Submitted:
    """An array in the queue."""

    directory: Path
    job_id: str
    jobs: int
    throttled: bool
    """Whether `cluster.max_running` limits it."""


def submit_runs(runs: Sequence[Run], estimates: Estimates) -> int:
    """Submit the runs without a result that nobody trains; say in a few lines what was done.

    Returns the number of jobs. Raises `UserError` when Slurm refuses; then it cancels what it has submitted.
    """
    submitted: list[Submitted] = []
    if ignored := ignored_defaults(os.environ):
        say(f"{', '.join(ignored)} do not count here; what a job asks for is set by cluster.*=…")
    try:
        for sweep_dir in dict.fromkeys(run.run_dir.parent for run in runs):
            own = [run for run in runs if run.run_dir.parent == sweep_dir]
            arrays_root(sweep_dir).mkdir(exist_ok=True)
            # a second launch waits here, and then sees the jobs of the first
            with claim(arrays_root(sweep_dir) / "submit.lock", wait=True):
                _submit_sweep(sweep_dir, own, estimates, submitted)
    except (client.SlurmError, UserError) as refused:
        for array in submitted:
            client.insist("scancel", array.job_id)
            shutil.rmtree(array.directory)
        if isinstance(refused, UserError):
            raise
        message = f"Slurm refused: {refused}; nothing was submitted; what a job asks for is set by cluster.*=…"
        raise UserError(message) from refused
    return sum(array.jobs for array in submitted)


def submit_decision(sweep_dir: Path, config: Config, command: Sequence[str]) -> None:
    """Submit a job of one process that runs `python -m COMMAND` when all jobs of the sweep have ended.

    Does nothing if one waits already. Raises `UserError` when Slurm refuses.
    """
    with claim(arrays_root(sweep_dir) / "submit.lock", wait=True):
        live = [element for element, _ in live_elements(sweep_dir)]
        decisions = [element for element in live if element.name.startswith(f"{sweep_dir.name}-{DECISION}-")]
        if any(element.state == "PENDING" for element in decisions):
            return
        working = {element.id.partition("_")[0] for element in live if element not in decisions}
        directory = array_directory(sweep_dir, DECISION)
        write_json_atomic(directory / "runs.json", [[]])
        after = [f"--dependency=afterany:{':'.join(sorted(working))}"] if working else []
        about = f"decides for {sweep_dir}"
        try:
            job_id = submit_script(
                directory, 1, lambda: decision_script(directory.resolve(), config.cluster, command, about=about), *after
            )
        except client.SlurmError as refused:
            raise UserError(
                f"Slurm refused the job that decides what comes next: {refused}; the runs go on, and the same command "
                "decides when they have ended"
            ) from refused
        say(f"job {job_id} decides what comes next, when these have ended")


def _submit_sweep(sweep_dir: Path, runs: Sequence[Run], estimates: Estimates, submitted: list[Submitted]) -> None:
    live = list(live_elements(sweep_dir))
    queued = {sweep_dir / run_id for _, run_ids in live for run_id in run_ids}
    _drop_unsubmitted(sweep_dir, {element.name for element, _ in live})
    states = {run.run_dir: state_of(run.run_dir).status for run in runs}
    ended = [run for run in runs if states[run.run_dir] in FINAL]
    elsewhere = [run for run in runs if states[run.run_dir] == "running" and run.run_dir not in queued]
    left_out = {run.run_dir for run in (*ended, *elsewhere)} | queued
    todo = [run for run in runs if run.run_dir not in left_out]
    waiting = sum(run.run_dir in queued for run in runs)
    outside = f", {len(elsewhere)} are being trained outside Slurm" if elsewhere else ""
    say(f"{sweep_dir}: {len(runs)} cells, {len(ended)} have ended, {waiting} have a job already{outside}")
    if not todo:
        return
    for run in todo:
        if states[run.run_dir] == "failed":
            set_failure_aside(run.run_dir)
    harvests = _submit_harvests(sweep_dir, todo, submitted)
    groups: dict[str, tuple[str | None, list[Job]]] = {}
    for job in cut_into_jobs(todo, estimates):
        harvest = harvests.get(store_path(job.config.activations, Path(job.config.out)))
        shape = (job.config.mesh, job.config.cluster, harvest)
        groups.setdefault(repr(shape), (harvest, []))[1].append(job)
    size = client.max_array_size()
    for harvest, jobs in groups.values():
        for start in range(0, len(jobs), size):
            part = jobs[start : start + size]
            # Slurm limits each array by itself: to limit the launch, a second one waits until the first has ended
            before = next((array.job_id for array in reversed(submitted) if array.throttled), None)
            submitted.append(_submit_array(sweep_dir, part, estimates, harvest, before))


def _drop_unsubmitted(sweep_dir: Path, live: set[str]) -> None:
    """Remove tables of a launch that was killed before it submitted them; `live` are the names in the queue."""
    for directory in arrays(sweep_dir):
        if directory.name not in live and not (directory / "submitted.json").exists():
            shutil.rmtree(directory)


def _submit_harvests(sweep_dir: Path, runs: Sequence[Run], submitted: list[Submitted]) -> dict[Path, str]:
    """Submit a job for the missing stores that one pass gives. Returns store → job id; the jobs that train wait for
    theirs."""
    ids: dict[Path, str] = {}
    harvested = [run.config for run in runs if run.config.activations.kind != "synthetic"]
    stores = {store_path(config.activations, Path(config.out)): config for config in harvested}
    missing = {store: config for store, config in stores.items() if not is_complete(store)}
    for store, config in missing.items():
        if store in ids:
            continue
        for failure in arrays_root(sweep_dir).glob("*/failed.txt"):
            failure.unlink()  # it is tried again
        directory = array_directory(sweep_dir, "harvest")
        freeze(directory, config)
        freeze_other_hooks(directory, config, missing.values())
        write_json_atomic(directory / "runs.json", [[]])
        array = _sbatch(directory, config, 1, LEAD_MARGIN_S, harvest=True, about=f"makes the store {store}")
        submitted.append(array)
        ids[store] = array.job_id
        ids |= {
            other: array.job_id
            for other, its in missing.items()
            if shares_forwards(config.activations, its.activations)
        }
        say(f"job {array.job_id} harvests the activations first")
    return ids


def _submit_array(
    sweep_dir: Path, jobs: Sequence[Job], estimates: Estimates, harvest: str | None, before: str | None
) -> Submitted:
    """Freeze the configurations of the elements, then submit the array, to start after its harvest has made the store
    and after the throttled array `before` has ended."""
    directory = array_directory(sweep_dir, "cells")
    write_tables(directory, jobs)
    config = jobs[0].config
    size = max(sum(estimates.of(run).checkpoint_bytes for run in job.runs) for job in jobs)
    cells = sum(len(job.runs) for job in jobs)
    ranks, lead = config.mesh.ranks, lead_s(config.cluster, size)
    about = f"{cells} cells of {sweep_dir} in {len(jobs)} jobs of {ranks} ranks; {command_line()}"
    after = [f"afterok:{harvest}"] if harvest else []
    if before is not None and config.cluster.max_running:
        after.append(f"afterany:{before}")
    array = _sbatch(directory, config, len(jobs), lead, harvest=False, about=about, after=after)
    say(f"job {array.job_id}: {cells} cells in {len(jobs)} jobs ({directory / 'job.sh'})")
    return array


def write_tables(directory: Path, jobs: Sequence[Job]) -> None:
    """Freeze which runs each element of an array trains, and their configurations."""
    write_json_atomic(directory / "runs.json", [[run.run_id for run in job.runs] for job in jobs])
    frozen = ({run.run_id: to_container(run.config) for run in job.runs} for job in jobs)
    write_text_atomic(directory / "configs.jsonl", "".join(json.dumps(entry) + "\n" for entry in frozen))


def lead_s(cluster: ClusterConfig, checkpoint_bytes: float) -> int:
    """How many seconds before the end Slurm is to send its signal (it may come a minute early)."""
    lead = cluster.lead_s or round(LEAD_MARGIN_S + 2 * checkpoint_bytes / SAVE_BYTES_PER_S)
    return max(1, min(lead, round(time_limit(cluster.time) / 2)))


def array_directory(sweep_dir: Path, what: str) -> Path:
    """A new directory; its name is the job's name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(10_000):
        directory = arrays_root(sweep_dir) / f"{sweep_dir.name}-{what}-{stamp}-{number}"
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        (directory / "log").mkdir()
        return directory
    raise AssertionError("ten thousand arrays in one second")


def _sbatch(
    directory: Path,
    config: Config,
    count: int,
    lead: int,
    *,
    harvest: bool,
    about: str,
    after: Sequence[str] = (),
) -> Submitted:
    # a harvest that fails must not leave its dependents waiting for ever
    flags = [f"--dependency={','.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    job_id = submit_script(
        directory,
        count,
        lambda: job_script(directory.resolve(), config.cluster, config.mesh, count, lead, harvest=harvest, about=about),
        *flags,
    )
    return Submitted(directory, job_id, count, throttled=not harvest and config.cluster.max_running > 0)


def submit_script(directory: Path, count: int, script: Callable[[], str], *flags: str) -> str:
    """Write what `script` gives into the directory of an array of `count` elements and submit it; returns the job's id.

    If that raises, the directory is removed.
    """
    path = directory / "job.sh"
    try:
        write_text_atomic(path, script())
        fsync_directory(directory)
        job_id = client.submit(str(path), *flags)
    except (client.SlurmError, UserError):
        shutil.rmtree(directory)
        raise
    write_json_atomic(directory / "submitted.json", {"job_id": job_id, "jobs": count, "time": now()})
    return job_id
