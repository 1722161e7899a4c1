"""What a run will cost: time, FLOPs, memory, disk. Times come from steps timed on this machine, or, for a GPU type that
a person names, from its data sheet (`harness.jobs.gpus`)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness import budget
from harness.config import Config, MeshConfig
from harness.jobs.gpus import Gpu, find_gpu, known_gpus, step_seconds
from harness.jobs.pack import Job
from harness.jobs.plan import Run, tokens_of
from harness.jobs.rundir import FINAL
from harness.record.provenance import machine, now
from harness.train.schedule import evaluation_steps

SHAPES = 6
"""Steps of this many cells are timed; the others lie between them."""

SHAPE_S = 0.25
"""Seconds for one of them, beside loading kernels."""

CALIBRATION_SHARE = 0.02
"""Calibration may take this share of the time that the work would take at `ASSUMED_FLOPS_PER_S`."""

ASSUMED_FLOPS_PER_S = 1e11
MOST_STEP_FLOPS = 1e10
"""Larger steps are timed at a smaller batch, then a smaller width."""

LEAST_BATCH = 256
PROCESS_START_S = 6.0
"""Interpreter, torch, kernels and the opened store, for a job that starts processes of its own."""

RUN_START_S = 0.5
"""Record, tracker and final weights of a run, beside the start that is timed."""

EVALUATION_OVER_STEP = 0.5
"""A row that is evaluated costs about half of one that is trained on: no gradients, no update."""

PROCESS_BYTES = 450_000_000
"""Interpreter, torch and compiled kernels."""

SAVE_COPIES = 2
"""Writing a checkpoint takes this many times its size in memory beside the state."""

START_BYTES_PER_NUMBER = 28
"""Of the sample that sets normalisation and the initial centre: as stored in float32, then three times in float64."""


@dataclass(frozen=True)
class Estimate:
    """Of one run, trained from its beginning, alone. What depends on an unknown width or speed is None."""

    tokens: int | None = None
    params: int | None = None
    flops: dict[str, float] = field(default_factory=dict)
    """Closed form, by part, of the whole run."""
    seconds: float | None = None
    """Start, training, evaluations. With `train.until=convergence`: at most."""
    train_s: float | None = None
    """The part of `seconds` that the record counts as `wall_s`: steps and evaluations."""
    start_s: float = 0.0
    """The part of `seconds` that a job pays once, however many runs it has."""
    memory_bytes: int | None = None
    """Peak of one rank: of the GPU where it runs on one, else of the process."""
    shared_bytes: int = 0
    """The part of `memory_bytes` that the runs of a pack use in turn."""
    checkpoint_bytes: int = 0
    """One checkpoint; while the next is written there are two."""
    weights_bytes: int = 0
    sent_bytes: float = 0.0
    """Sent per step by one rank."""


class Timed(NamedTuple):
    """A measured point: FLOPs of what was timed, and seconds."""

    flops: float
    seconds: float


@dataclass
class Calibration:
    """Where times come from."""

    source: str = ""
    """In words, for people; empty when there are no times."""
    problem: str = ""
    """Why there are none, or not for all."""
    time: str = ""
    seconds: float = 0.0
    """How long it took."""
    start_s: float = 0.0
    steps: dict[tuple[Any, ...], list[Timed]] = field(default_factory=dict)
    """By `_kind`, FLOPs ascending."""
    evaluations: dict[tuple[Any, ...], list[Timed]] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """For the record."""
        points = [point._asdict() for points in self.steps.values() for point in points]
        words = {"source": self.source, "problem": self.problem, "time": self.time, "seconds": self.seconds}
        return {**words, "start_s": self.start_s, "steps": points}


@dataclass
class Estimates:
    """Of the runs of a sweep."""

    calibration: Calibration
    by_dir: dict[Path, Estimate]

    def of(self, run: Run) -> Estimate:
        return self.by_dir[run.run_dir]

    def seconds_of(self, run: Run) -> float | None:
        return self.by_dir[run.run_dir].seconds

    def job_seconds(self, job: Job) -> float | None:
        """Of a job that trains its runs on one stream."""
        parts = [self.of(run) for run in job.runs]
        if any(part.seconds is None for part in parts):
            return None
        return max(part.start_s for part in parts) + sum((part.seconds or 0.0) - part.start_s for part in parts)

    def job_memory(self, job: Job) -> int | None:
        """Peak of one rank of the job: every run's own, and once what they use in turn."""
        parts = [self.of(run) for run in job.runs]
        if any(part.memory_bytes is None for part in parts):
            return None
        own = sum((part.memory_bytes or 0) - part.shared_bytes for part in parts)
        return own + max(part.shared_bytes for part in parts)


def estimate(runs: Sequence[Run]) -> Estimates:
    """Estimates of all runs; a few seconds for a calibration unless every run has ended or has a named GPU."""
    calibration = calibrate([run for run in runs if run.status not in FINAL])
    return Estimates(calibration, {run.run_dir: _estimate(run, calibration) for run in runs})


def ranks_of(config: Config) -> int:
    return config.mesh.dp * config.mesh.shard


def on_gpu(config: Config) -> bool:
    """Whether the run will train on a GPU, as far as can be known here."""
    if config.train.device == "cpu":
        return False
    if config.cluster.gpu_type:
        return True
    if config.cluster.name == "slurm":
        return config.cluster.gpus_per_task > 0
    import torch

    return torch.cuda.is_available()


def _estimate(run: Run, calibration: Calibration) -> Estimate:
    config, d_model = run.config, run.store.d_model
    if d_model is None:
        return Estimate()
    tokens = tokens_of(config, d_model)
    per_token = budget.flops_per_token(config.sae, d_model, config.train.batch_tokens)
    start = _start_seconds(config)
    trained = _train_seconds(config, d_model, calibration)
    memory = budget.memory_bytes(config, d_model)
    checkpoint = budget.checkpoint_bytes(config, d_model)
    own, shared = memory["weights"] + memory["counters"], memory["step"]
    if not on_gpu(config):
        sample = START_BYTES_PER_NUMBER * d_model * _sample_rows(config)
        save = SAVE_COPIES * checkpoint // ranks_of(config)
        shared = PROCESS_BYTES + max(shared, sample, save)
    return Estimate(
        tokens=tokens,
        params=budget.params(config.sae, d_model),
        flops={part: flops * tokens for part, flops in per_token.items()},
        seconds=None if trained is None else start + RUN_START_S + calibration.start_s + trained,
        train_s=trained,
        start_s=start,
        memory_bytes=own + shared,
        shared_bytes=shared,
        checkpoint_bytes=checkpoint,
        weights_bytes=budget.weights_bytes(config, d_model),
        sent_bytes=sum(budget.bytes_sent_per_step(config, d_model).values()),
    )


def _sample_rows(config: Config) -> int:
    from harness.activations.source import SAMPLE_ROWS

    activations = config.activations
    return SAMPLE_ROWS if activations.kind == "synthetic" else min(SAMPLE_ROWS, round(activations.tokens))


def _start_seconds(config: Config) -> float:
    """What a job needs before its first step."""
    ranks = ranks_of(config)
    if config.cluster.name == "slurm":
        return PROCESS_START_S
    return PROCESS_START_S * max(1.0, ranks / _cores()) if ranks > 1 else 0.0


def _train_seconds(config: Config, d_model: int, calibration: Calibration) -> float | None:
    """Steps and evaluations of a run."""
    steps = budget.total_steps(config, d_model)
    heldout = round(config.activations.heldout_tokens)
    looks = len(evaluation_steps(config, steps)) * min(config.train.eval_rows, heldout) + heldout
    if config.cluster.gpu_type:
        gpu = _gpu(config)
        step_s = None if gpu is None else step_seconds(gpu, config, d_model)
        if step_s is None:
            return None
        row_s = EVALUATION_OVER_STEP * step_s / config.train.batch_tokens
    else:
        points = calibration.steps.get(_kind(config))
        if not points:
            return None
        at_once = _at_once(config)
        step_s = interpolate(points, _step_flops(config, d_model)) / at_once
        batch_s = interpolate(calibration.evaluations[_kind(config)], _evaluation_flops(config, d_model))
        row_s = batch_s / config.train.batch_tokens / at_once
    return steps * step_s + looks * row_s


def _gpu(config: Config) -> Gpu | None:
    return find_gpu(config.cluster.gpu_type)


def _cores() -> int:
    import torch

    return torch.get_num_threads()


def _at_once(config: Config) -> int:
    """How many times the speed of one process a mesh is expected to reach: ranks on this machine's processor share its
    cores."""
    import torch

    if config.cluster.name == "slurm":
        return ranks_of(config)
    return max(1, min(ranks_of(config), torch.cuda.device_count())) if on_gpu(config) else 1


def _kind(config: Config) -> tuple[Any, ...]:
    """Cells of one kind differ in size only."""
    train = config.train
    return (config.sae.architecture, train.precision, train.device, train.threads, config.ops)


def _step_flops(config: Config, d_model: int) -> float:
    batch = config.train.batch_tokens
    return sum(budget.flops_executed_per_token(config.sae, d_model, batch, n_dead=0).values()) * batch


def _evaluation_flops(config: Config, d_model: int) -> float:
    """Of a batch that is only reconstructed."""
    batch = config.train.batch_tokens
    parts = budget.flops_executed_per_token(config.sae, d_model, batch, n_dead=0)
    return sum(parts[name] for name in ("encoder", "selection", "decode", "router")) * batch


def interpolate(points: Sequence[Timed], flops: float) -> float:
    """Seconds at `flops`: straight lines between the points in log-log; above them in proportion to FLOPs, below as
    much as the cheapest."""
    if flops <= points[0].flops:
        return points[0].seconds
    for left, right in itertools.pairwise(points):
        if flops <= right.flops:
            share = math.log(flops / left.flops) / math.log(right.flops / left.flops)
            return left.seconds * (right.seconds / left.seconds) ** share
    return points[-1].seconds * flops / points[-1].flops


def calibrate(runs: Sequence[Run]) -> Calibration:
    """Time real steps of a few of the runs on this machine; what cannot be timed is said in `problem`."""
    calibration = Calibration(time=now())
    here = [run for run in runs if not run.config.cluster.gpu_type and run.store.d_model is not None]
    named = {run.config.cluster.gpu_type for run in runs} - {""}
    said = []
    for name in sorted(named):
        gpu = find_gpu(name)
        if gpu is None:
            calibration.problem = f"no figures for cluster.gpu_type={name}; known: {known_gpus()}"
        else:
            said.append(f"data sheet of {gpu.name}, unmeasured")
    if here:
        begin = time.perf_counter()
        try:
            said.append(_calibrate_here(here, calibration))
        except (RuntimeError, ValueError, MemoryError) as error:
            # a step that this machine cannot do says nothing against the cluster that is to do it
            calibration.problem = f"steps could not be timed here: {' '.join(str(error).split())}"
        calibration.seconds = time.perf_counter() - begin
    calibration.source = "; ".join(said)
    return calibration


def _calibrate_here(runs: Sequence[Run], calibration: Calibration) -> str:
    """Fill in `calibration` and return what was measured, in words."""
    from harness.record.memory import reset_peak
    from harness.train.speed import measure_speed, measure_start

    load = os.getloadavg()[0]
    shapes = probes(runs)
    work = sum(_step_flops(run.config, run.store.d_model or 0) * _steps(run) for run in runs) / ASSUMED_FLOPS_PER_S
    seconds = min(SHAPE_S, CALIBRATION_SHARE * work / len(shapes))
    first, d_model = shapes[0]
    calibration.start_s = measure_start(first, d_model, _sample_rows(first))
    for config, d_model in shapes:
        speed = measure_speed(config, d_model, seconds)
        key = _kind(config)
        calibration.steps.setdefault(key, []).append(Timed(_step_flops(config, d_model), speed.step_s))
        looked = Timed(_evaluation_flops(config, d_model), speed.evaluation_s)
        calibration.evaluations.setdefault(key, []).append(looked)
    for points in (*calibration.steps.values(), *calibration.evaluations.values()):
        points.sort()
    reset_peak()
    about, threads = machine(), first.train.threads or _cores()
    processor = about["gpus"][0] if on_gpu(first) else f"{about['cpu']}, {threads} threads"
    others = f" that is busy with other work (load {load:.1f})" if load > 0.5 * (os.cpu_count() or 1) else ""
    return f"{len(shapes)} of the shapes timed on {processor}{others}"


def _steps(run: Run) -> int:
    return budget.total_steps(run.config, run.store.d_model or 1)


def probes(runs: Iterable[Run]) -> list[tuple[Config, int]]:
    """(configuration, d_model) of the steps to time: for each kind of cell at quantiles of FLOPs, cut down where they
    are too dear."""
    kinds: dict[tuple[Any, ...], dict[float, tuple[Config, int]]] = {}
    for run in runs:
        config, d_model = run.config, run.store.d_model or 0
        kinds.setdefault(_kind(config), {})[_step_flops(config, d_model)] = (config, d_model)
    each = max(1, SHAPES // len(kinds))
    chosen: dict[tuple[Any, ...], tuple[Config, int]] = {}
    for kind, cells in kinds.items():
        ordered = [cells[flops] for flops in sorted(cells)]
        count = min(each, len(ordered))
        places = {round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)}
        for place in sorted(places):
            config, d_model = ordered[place]
            small = _smaller(config, d_model)
            chosen[(kind, _step_flops(small, d_model))] = (small, d_model)
    return list(chosen.values())


def _smaller(config: Config, d_model: int) -> Config:
    """One process, and a step of at most `MOST_STEP_FLOPS`."""
    config = dataclasses.replace(config, mesh=MeshConfig())
    while _step_flops(config, d_model) > MOST_STEP_FLOPS:
        sae, train = config.sae, config.train
        if train.batch_tokens >= 2 * LEAST_BATCH:
            config = dataclasses.replace(config, train=dataclasses.replace(train, batch_tokens=train.batch_tokens // 2))
        elif sae.n_latents // 2 >= 8 * sae.k * sae.n_experts and sae.n_latents % (2 * sae.n_experts) == 0:
            config = dataclasses.replace(config, sae=dataclasses.replace(sae, n_latents=sae.n_latents // 2))
        else:
            break
    return config
