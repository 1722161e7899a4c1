"""Runs to jobs: which runs share a process group and a stream, so that a job is not too long and fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.cost.estimate import Estimates
from harness.cost.limits import memory_problem
from harness.record.job import Job, begun_alone, begun_packs, job_of
from harness.record.peers import groups_of, require_peers
from harness.record.run import Run

MAX_MEMBERS = 16
"""The plan never puts more runs into one pack."""


def cut_into_jobs(runs: Sequence[Run], estimates: Estimates) -> list[Job]:
    """The runs to train, as jobs that are not too long and fit into memory."""
    return make_jobs(runs, estimates.seconds_of, lambda job: not memory_problem(job, estimates))


def make_jobs(runs: Sequence[Run], seconds_of: Callable[[Run], float | None], fits: Callable[[Job], bool]) -> list[Job]:
    """Cut the runs to train into jobs, in their order.

    A run that has saved something alone stays alone. A pack that has saved something stays this pack, unless
    `cluster.pack=1` forbids packs: then its runs begin anew, alone. The others are packed as `cluster.pack` says. Peers
    (`train.mfr_seeds`) are never apart. `seconds_of` estimates the time of a run, `fits` tells whether a job fits into
    memory. Raises `UserError` for a run without its peers.
    """
    by_dir = {run.run_dir: run for run in runs}
    jobs: list[Job] = []
    settled: set[Path] = set()
    for sweep_dir in dict.fromkeys(run.sweep_dir for run in runs):
        for home, run_ids in begun_packs(sweep_dir):
            wanted = [by_dir[sweep_dir / run_id] for run_id in run_ids if sweep_dir / run_id in by_dir]
            present = [run for run in wanted if not _stays_alone(run)]
            if present:
                jobs.append(Job(tuple(present), home))
                settled.update(run.run_dir for run in present)
    alike: dict[Any, list[Run]] = {}
    for run in runs:
        if run.run_dir not in settled:
            alike.setdefault(run.run_dir if _stays_alone(run) else _shared_settings(run), []).append(run)
    for part in alike.values():
        groups = groups_of(part)
        for group in groups:
            require_peers(group)
        jobs += [job_of(pack) for pack in _cut(groups, seconds_of, fits)]
    order = {run.run_dir: place for place, run in enumerate(runs)}
    return sorted(jobs, key=lambda job: order[job.runs[0].run_dir])


def _stays_alone(run: Run) -> bool:
    return not run.config.train.peers and (run.config.cluster.pack == 1 or begun_alone(run.run_dir))


def _shared_settings(run: Run) -> tuple[Any, ...]:
    """What the runs of a pack have in common: the batches, and the place where they train."""
    config = run.config
    train, mesh = config.train, config.mesh
    place = (mesh.dp, mesh.shard, mesh.lm, train.device, train.threads, config.ops, repr(config.cluster))
    return (run.sweep_dir, run.store.id, config.stream.seed, train.batch_tokens, train.objective == "local", *place)


def _cut(
    groups: Sequence[Sequence[Run]], seconds_of: Callable[[Run], float | None], fits: Callable[[Job], bool]
) -> Iterator[list[Run]]:
    """Packs of `cluster.pack` runs, or of as many as the plan prefers.

    On this machine the plan packs nothing, since one process trains all runs anyway, unless the language model would
    compute the windows again for every job. On a cluster it fills a pack until the
    job is estimated to take `cluster.pack_minutes` or to fill the memory. Runs of a group stay together.
    """
    cluster = groups[0][0].config.cluster
    windows = groups[0][0].config.activations.keep == "window"
    most = cluster.pack or (1 if cluster.name == "local" and not windows else MAX_MEMBERS)
    limit_s = float("inf") if cluster.pack or (windows and cluster.name == "local") else 60 * cluster.pack_minutes
    part: list[Run] = []
    planned_s = 0.0
    for group in groups:
        times = [seconds_of(run) for run in group]
        unknown = any(seconds is None for seconds in times)
        cost = limit_s if unknown and not cluster.pack else sum(seconds or 0.0 for seconds in times)
        full = len(part) + len(group) > most or planned_s + cost > limit_s
        if part and (full or not (cluster.pack or fits(job_of([*part, *group])))):
            yield part
            part, planned_s = [], 0.0
        part += group
        planned_s += cost
    yield part
