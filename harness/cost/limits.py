"""The disk and the memory that a plan needs, and whether they suffice."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.budget import HARVEST_COPIES, NUMBER_BYTES
from harness.config import ActivationsConfig, Config, MeshConfig
from harness.cost.estimate import Estimates, rank_memory
from harness.cost.windows import window_bytes
from harness.process.device import planned_on_gpu
from harness.process.gpus import find_gpu
from harness.record.job import Job
from harness.record.run import Run
from harness.terminal import duration, listed, si

FITS = 0.9
"""Share of a memory that a job may plan to use: allocators keep some for themselves."""

LINE_BYTES = 600
"""Size of a line of `metrics.jsonl`."""


@dataclass(frozen=True)
class Disk:
    """Bytes that a plan needs."""

    stores: float
    """Activations that must still be harvested."""
    harvest: float
    """The same while the largest store is being harvested."""
    stores_there: float
    """Activations that exist already."""
    results: float
    """Final weights and records of the runs to do."""
    checkpoints: float
    """The most at any time, including checkpoints that are being written."""
    windows: float
    """The most at any time, of the jobs that compute their activations in windows."""

    def needed(self) -> float:
        return max(self.stores, self.harvest) + self.results + self.checkpoints + self.windows


def store_bytes(config: ActivationsConfig, d_model: int) -> float:
    """Size of a store: its rows, and the document number of each row; with windows, that of their first rows. Synthetic
    activations take no space."""
    if config.kind == "synthetic":
        return 0.0
    return (config.stored_tokens + config.heldout_tokens) * (d_model * NUMBER_BYTES[config.dtype] + 8)


def disk(runs: Sequence[Run], jobs: Sequence[Job], estimates: Estimates) -> Disk:
    """Disk for all `runs` of a sweep, whose unfinished ones are trained by `jobs`."""
    from harness.activations.store.paths import is_complete, store_root

    new, existing = [], []
    sections = {run.store.id: run for run in runs if run.store.d_model is not None}
    for run in sections.values():
        size = store_bytes(run.config.activations, run.store.d_model or 0)
        place = store_root(run.config.activations, Path(run.config.out)) / run.store.id
        (existing if is_complete(place) else new).append(size)
    results, saving = 0.0, []
    for job in jobs:
        parts = [estimates.of(run) for run in job.runs]
        for run, part in zip(job.runs, parts, strict=True):
            lines = (part.tokens or 0) / run.config.train.batch_tokens / run.config.train.log_every_steps
            results += part.weights_bytes + LINE_BYTES * lines
        saving.append(2.0 * sum(part.checkpoint_bytes for part in parts))
    at_once = _at_once(jobs)
    windows = [window_bytes(job.config.activations, job.runs[0].store.d_model or 0) for job in jobs]
    return Disk(
        stores=sum(new),
        harvest=sum(new) + (HARVEST_COPIES - 1) * max(new, default=0.0),
        stores_there=sum(existing),
        results=results,
        checkpoints=sum(sorted(saving, reverse=True)[:at_once]),
        windows=sum(sorted(windows, reverse=True)[:at_once]),
    )


def _at_once(jobs: Sequence[Job]) -> int:
    """How many jobs may run at the same time."""
    if not jobs or jobs[0].config.cluster.name == "local":
        return 1
    return jobs[0].config.cluster.max_running or len(jobs)


def would_not_fit(jobs: Sequence[Job], estimates: Estimates, needed: Disk) -> list[str]:
    """One line for each limit that the plan exceeds, with a remedy."""
    lines = []
    for job in jobs:
        lines += filter(None, [memory_problem(job, estimates), _host_problem(job, estimates)])
    if len(lines) > 5:
        lines = [*lines[:5], f"… and {len(lines) - 5} more jobs"]
    if jobs:
        place = _existing(jobs[0].home)
        free = shutil.disk_usage(place).free
        if needed.needed() > free:
            lines.append(
                f"disk: {si(needed.needed())}B needed, but {si(free)}B are free in {place}; "
                "choose another out= or activations.dir=, or fewer cells"
            )
    return lines


def _existing(path: Path) -> Path:
    """`path` or its nearest parent that is an existing directory."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def memory_problem(job: Job, estimates: Estimates) -> str:
    """Why the job does not fit into the memory of a rank, with a remedy; empty if it fits or the plan cannot know."""
    needed, memory = estimates.job_memory(job), available(job.config)
    if needed is None or memory is None:
        return ""
    size, where = memory
    if needed <= FITS * size:
        return ""
    first, packed = job.runs[0], len(job.runs) > 1
    remedy = "lower train.batch_tokens or sae.n_latents"
    if packed:
        remedy = "lower cluster.pack"
    elif (shard := _enough_shards(first, size)) is not None:
        remedy = f"mesh.shard={shard} would suffice"
    name = f"pack {job.home.name}" if packed else first.run_id
    return f"memory: {name} needs {si(needed)}B per rank, {where} has {si(size)}B; {remedy}"


def _host_problem(job: Job, estimates: Estimates) -> str:
    """Why the process of a rank on a GPU does not fit into its share of a node; empty if it does, as far as known."""
    memory = _share_of_node(job.config)
    if memory is None or not planned_on_gpu(job.config):
        return ""
    needed = max(estimates.of(run).host_bytes for run in job.runs)
    if needed <= memory[0]:
        return ""
    return (
        f"memory of the node: {job.runs[0].run_id} needs more than {si(needed)}B per rank, {memory[1]} is "
        f"{si(memory[0])}B; raise cluster.mem"
    )


def _share_of_node(config: Config) -> tuple[float, str] | None:
    """Bytes of memory of a rank's share of a Slurm node, and words for it; None if they are not asked for."""
    cluster = config.cluster
    if cluster.name != "slurm" or not cluster.mem:
        return None
    ranks = cluster.tasks_per_node or config.mesh.ranks
    return memory_limit(cluster.mem) / ranks, f"its share of cluster.mem={cluster.mem}"


def available(config: Config) -> tuple[float, str] | None:
    """Bytes of memory for one rank and the name of that memory; None if the plan cannot know."""
    cluster, ranks = config.cluster, config.mesh.ranks
    if planned_on_gpu(config):
        if cluster.gpu_type:
            gpu = find_gpu(cluster.gpu_type)
            return None if gpu is None else (gpu.memory_bytes, f"an {gpu.name}")
        if cluster.name == "slurm":
            return None
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory), "the GPU here"
    if cluster.name == "slurm":
        return _share_of_node(config)
    import psutil

    return psutil.virtual_memory().total / ranks, "this machine" if ranks == 1 else "its share of this machine"


def _enough_shards(run: Run, size: float) -> int | None:
    """The smallest `mesh.shard` with which the part of one rank fits on a GPU of `size` bytes."""
    config, d_model = run.config, run.store.d_model
    if d_model is None or not planned_on_gpu(config):
        return None
    cut = config.sae.n_experts if config.sae.traits.routed else config.sae.n_latents
    for shard in (2, 4, 8, 16, 32, 64):
        if shard > config.mesh.shard and cut % shard == 0:
            part = dataclasses.replace(config, mesh=MeshConfig(dp=config.mesh.dp, shard=shard))
            if sum(rank_memory(part, d_model).values()) <= FITS * size:
                return shard
    return None


def memory_limit(text: str) -> float:
    """Bytes of a memory size in Slurm's notation: `64G`, `512M`; a number without a unit means megabytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "M")
    return float(number) * units[unit]


def time_limit(text: str) -> float:
    """Seconds of a time limit in Slurm's notation: MINUTES, MM:SS, HH:MM:SS, DAYS-HH, DAYS-HH:MM, DAYS-HH:MM:SS."""
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = 0, parts[0], sum(parts[1:])
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


def longer_than_the_limit(jobs: Sequence[Job], estimates: Estimates) -> list[str]:
    """A line about jobs that need several allocations, which they are given automatically; empty if there are none."""
    over = []
    for job in jobs:
        seconds, cluster = estimates.job_seconds(job), job.config.cluster
        if cluster.name != "slurm" or seconds is None:
            continue
        room = max(time_limit(cluster.time) - cluster.lead_s, 1.0)
        if seconds > room:
            over.append(f"{job.home.name} in {-(-seconds // room):.0f} ({duration(seconds)})")
    if not over:
        return []
    return [f"longer than cluster.time={jobs[0].config.cluster.time}, continued in further allocations: {listed(over)}"]
