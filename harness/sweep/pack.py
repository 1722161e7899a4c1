"""Runs to jobs: cells that see the same batches may share one process group and one stream (a pack).

A pack lives in `<sweep>/_packs/<id>/`: `pack.json` names its runs for good, `checkpoints/` commit all of them under one
marker, so that no kill leaves two of them at different steps; `attempts/` holds the logs. Each run keeps its own
directory with its own metrics, weights and result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config import Config
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.record.rundir import freeze, read_config
from harness.sweep.runs import Run

MAX_MEMBERS = 16
"""Cells that the plan puts into one pack at most."""


@dataclass(frozen=True)
class Job:
    """What one process group trains: a run alone, or a pack."""

    runs: tuple[Run, ...]
    home: Path
    """The run's directory, or the pack's."""

    @property
    def config(self) -> Config:
        """Of the first run: mesh, cluster, device and stream are the same for all."""
        return self.runs[0].config


@dataclass(frozen=True)
class Target:
    """A job as its files tell it, for the process that trains it."""

    home: Path
    run_dirs: tuple[Path, ...]
    """All runs of the job, also those that have ended."""

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    def configs(self) -> list[Config]:
        return [read_config(run_dir) for run_dir in self.run_dirs]


def pack_id(run_ids: Iterable[str]) -> str:
    """The same runs always have the same pack."""
    names = sorted(run_ids)
    return f"{len(names)}-{hashlib.sha256(' '.join(names).encode()).hexdigest()[:10]}"


def packs_root(sweep_dir: Path) -> Path:
    return sweep_dir / "_packs"


def job_of(runs: Sequence[Run]) -> Job:
    """The job of runs that are trained together; one alone has its own directory as home."""
    if len(runs) == 1:
        return Job(tuple(runs), runs[0].run_dir)
    home = packs_root(runs[0].run_dir.parent) / pack_id(run.run_id for run in runs)
    return Job(tuple(runs), home)


def freeze_job(job: Job) -> tuple[Path, ...]:
    """Write the configurations of the job's runs and, for a pack, which runs it has. Returns their directories, for a
    pack that began earlier also of those that were not asked for now."""
    for run in job.runs:
        freeze(run.run_dir, run.config)
    if job.home == job.runs[0].run_dir:
        return (job.home,)
    if not (job.home / "pack.json").exists():
        job.home.mkdir(parents=True, exist_ok=True)
        write_json_atomic(job.home / "pack.json", {"runs": [run.run_id for run in job.runs]})
    run_dirs = read_target(job.home).run_dirs
    for run_dir in set(run_dirs) - {run.run_dir for run in job.runs}:
        place = {"mesh": job.config.mesh, "cluster": job.config.cluster, "ops": job.config.ops}
        freeze(run_dir, dataclasses.replace(read_config(run_dir), **place))
    return run_dirs


def read_target(home: Path) -> Target:
    """The job in a directory: a run's (`config.yaml`) or a pack's (`pack.json`). Raises `UserError` for another one."""
    if not (home / "pack.json").is_file():
        read_config(home)
        return Target(home, (home,))
    members = (home.parent.parent / run_id for run_id in _members(home))
    return Target(home, tuple(run_dir for run_dir in members if not begun_alone(run_dir)))


def _members(home: Path) -> list[str]:
    path = home / "pack.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {home}, its runs then begin anew") from error


def begun_packs(sweep_dir: Path) -> Iterator[tuple[Path, list[str]]]:
    """Home and run_ids of every pack that has saved something: it goes on as it was frozen."""
    for path in sorted(packs_root(sweep_dir).glob("*/pack.json")):
        if any((path.parent / "checkpoints").glob("step-*")):
            yield path.parent, _members(path.parent)


def pack_sizes(sweep_dir: Path) -> dict[str, int]:
    """Of each run that was ever put into a pack, how many runs the newest one has."""
    packs = sorted(packs_root(sweep_dir).glob("*/pack.json"), key=lambda path: path.stat().st_mtime)
    members = [_members(path.parent) for path in packs]
    return {run_id: len(names) for names in members for run_id in names}


def begun_alone(run_dir: Path) -> bool:
    """Whether a run has saved something by itself: then it is where no other is, and stays alone."""
    return any((run_dir / "checkpoints").glob("step-*"))


def make_jobs(runs: Sequence[Run], seconds_of: Callable[[Run], float | None], fits: Callable[[Job], bool]) -> list[Job]:
    """Cut the runs that are to be trained into jobs, in their order.

    A run that has saved something alone stays alone, a pack that has saved something stays this pack (unless
    `cluster.pack=1` forbids packs: its runs then begin anew, alone); the others are packed as `cluster.pack` says.
    `seconds_of` estimates a run's time, `fits` whether a job finds room in memory.
    """
    by_name = {run.run_dir: run for run in runs}
    jobs: list[Job] = []
    settled: set[Path] = set()
    for sweep_dir in dict.fromkeys(run.run_dir.parent for run in runs):
        for home, members in begun_packs(sweep_dir):
            asked = [by_name[sweep_dir / name] for name in members if sweep_dir / name in by_name]
            present = [run for run in asked if run.config.cluster.pack != 1 and not begun_alone(run.run_dir)]
            if present:
                jobs.append(Job(tuple(present), home))
                settled.update(run.run_dir for run in present)
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        if run.run_dir in settled:
            continue
        alone = run.config.cluster.pack == 1 or begun_alone(run.run_dir)
        groups.setdefault(run.run_dir if alone else _shared(run), []).append(run)
    for members in groups.values():
        jobs += [job_of(part) for part in _cut(members, seconds_of, fits)]
    order = {run.run_dir: place for place, run in enumerate(runs)}
    return sorted(jobs, key=lambda job: order[job.runs[0].run_dir])


def _shared(run: Run) -> tuple[Any, ...]:
    """What runs of one pack have in common: the batches, and where they are trained."""
    config = run.config
    train, mesh = config.train, config.mesh
    place = (mesh.dp, mesh.shard, train.device, train.threads, config.ops, repr(config.cluster))
    return (run.run_dir.parent, run.store.id, config.stream.seed, train.batch_tokens, *place)


def _cut(
    members: Sequence[Run], seconds_of: Callable[[Run], float | None], fits: Callable[[Job], bool]
) -> Iterator[list[Run]]:
    """Packs of `cluster.pack` runs, or as many as the plan thinks good: locally none (one process trains all of them
    anyway), on a cluster until a job is estimated to take `cluster.pack_minutes` or to fill the memory."""
    cluster = members[0].config.cluster
    most = cluster.pack or (1 if cluster.name == "local" else MAX_MEMBERS)
    limit_s = float("inf") if cluster.pack else 60 * cluster.pack_minutes
    part: list[Run] = []
    planned_s = 0.0
    for run in members:
        seconds = seconds_of(run)
        cost = limit_s if seconds is None and not cluster.pack else seconds or 0.0
        full = len(part) == most or planned_s + cost > limit_s
        if part and (full or not (cluster.pack or fits(job_of([*part, run])))):
            yield part
            part, planned_s = [], 0.0
        part.append(run)
        planned_s += cost
    yield part
