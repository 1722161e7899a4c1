"""A job: what one process group trains, a run alone or a pack of runs that share a stream.

A pack lives in `<sweep>/_packs/<id>/`: `pack.json` names its runs for good, `checkpoints/` hold all of them under one
marker, so that no kill leaves two of them at different steps, and `attempts/` hold the logs. Each run keeps its own
directory with its own metrics, weights and result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config import Config
from harness.errors import UserError
from harness.files import write_json_atomic
from harness.record import names
from harness.record.run import Run, read_run
from harness.record.rundir import freeze, saved_step
from harness.schema import FILE_NAME, fields, list_of, read_json


@dataclass(frozen=True)
class Job:
    runs: tuple[Run, ...]
    home: Path
    """Directory of the run, or of the pack."""

    @property
    def config(self) -> Config:
        """Configuration of the first run: mesh, cluster, device and stream are the same for all."""
        return self.runs[0].config

    @property
    def run_dirs(self) -> tuple[Path, ...]:
        return tuple(run.run_dir for run in self.runs)

    @property
    def checkpoints(self) -> Path:
        return self.home / names.CHECKPOINTS


def pack_id(run_ids: Iterable[str]) -> str:
    """Name of the pack of these runs, in any order."""
    sorted_ids = sorted(run_ids)
    return f"{len(sorted_ids)}-{hashlib.sha256(' '.join(sorted_ids).encode()).hexdigest()[:10]}"


def packs_root(sweep_dir: Path) -> Path:
    return sweep_dir / names.PACKS


def job_of(runs: Sequence[Run]) -> Job:
    """The job that trains these runs together; a run alone has its own directory as home."""
    if len(runs) == 1:
        return Job(tuple(runs), runs[0].run_dir)
    return Job(tuple(runs), packs_root(runs[0].sweep_dir) / pack_id(run.run_id for run in runs))


def freeze_job(job: Job) -> Job:
    """Write the configurations of the job's runs and, for a pack, the list of its runs.

    Returns the job as its files now tell it: a pack that began earlier may have more runs than were asked for now.
    """
    for run in job.runs:
        freeze(run.run_dir, run.config)
    if job.home == job.runs[0].run_dir:
        return job
    if not (job.home / names.PACK).exists():
        job.home.mkdir(parents=True, exist_ok=True)
        write_json_atomic(job.home / names.PACK, {"runs": [run.run_id for run in job.runs]})
    place = {"mesh": job.config.mesh, "cluster": job.config.cluster, "ops": job.config.ops}
    runs = []
    for run in read_job(job.home).runs:
        if run.run_dir not in job.run_dirs:
            run = dataclasses.replace(run, config=dataclasses.replace(run.config, **place))
            freeze(run.run_dir, run.config)
        runs.append(run)
    return Job(tuple(runs), job.home)


def read_job(home: Path) -> Job:
    """The job whose home is a run's directory (`config.yaml`) or a pack's (`pack.json`), runs that have ended included.

    Raises `UserError` for any other directory.
    """
    if not (home / names.PACK).is_file():
        return Job((read_run(home),), home)
    run_dirs = (home.parent.parent / run_id for run_id in _run_ids(home))
    return Job(tuple(read_run(run_dir) for run_dir in run_dirs if not begun_alone(run_dir)), home)


def _run_ids(home: Path) -> list[str]:
    schema = fields({"runs": list_of(FILE_NAME)})
    return read_json(home / names.PACK, schema, f"remove {home}, its runs then begin anew")["runs"]


def begun_packs(sweep_dir: Path) -> Iterator[tuple[Path, list[str]]]:
    """Home and run_ids of every pack that has saved something: it goes on as it was frozen."""
    for path in sorted(packs_root(sweep_dir).glob(f"*/{names.PACK}")):
        if saved_step(path.parent) is not None:
            yield path.parent, _run_ids(path.parent)


def pack_sizes(sweep_dir: Path) -> dict[str, int]:
    """run_id → size of its newest pack. Packs whose list is damaged are left out; a launch names them."""
    sizes = {}
    for path in sorted(packs_root(sweep_dir).glob(f"*/{names.PACK}"), key=lambda path: path.lstat().st_mtime):
        with contextlib.suppress(UserError, FileNotFoundError):
            run_ids = _run_ids(path.parent)
            sizes |= dict.fromkeys(run_ids, len(run_ids))
    return sizes


def begun_alone(run_dir: Path) -> bool:
    """Whether a run has saved something by itself. Then it stands at a step of its own and stays alone."""
    return saved_step(run_dir) is not None
