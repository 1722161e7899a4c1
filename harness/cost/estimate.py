"""What a run will cost: time, FLOPs, memory, disk. Times come from steps timed on this machine, or, for a GPU type that
a person names, from its data sheet (`harness.cost.gpus`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import budget
from harness.config import ActivationsConfig, Config
from harness.cost.calibrate import (
    PROCESS_BYTES,
    Calibration,
    calibrate,
    cores,
    evaluation_flops,
    interpolate,
    kind_of,
    sample_rows,
    step_flops,
)
from harness.cost.gpus import find_gpu, step_seconds
from harness.process.device import planned_on_gpu
from harness.record.job import Job
from harness.record.result import FINAL
from harness.record.run import Run
from harness.training.schedule import evaluation_steps

PROCESS_START_S = 6.0
"""Interpreter, torch, kernels and the opened store, for a job that starts processes of its own."""

RUN_START_S = 0.5
"""Record, tracker and final weights of a run, beside the start that is timed."""

EVALUATION_OVER_STEP = 0.5
"""A row that is evaluated costs about half of one that is trained on: no gradients, no update."""

SAVE_COPIES = 2
"""Writing a checkpoint takes this many times its size in memory beside the state."""

NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Of a store, by its dtype."""

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
    once_s: float = 0.0
    """The part of `seconds` that a job pays once, however many runs it has: processes that start, a stream that is
    drawn."""
    memory_bytes: int | None = None
    """Peak of one rank: of the GPU where it runs on one, else of the process."""
    shared_bytes: int = 0
    """The part of `memory_bytes` that the runs of a pack use in turn."""
    mapped_bytes: int = 0
    """Rows of the store that are read through memory maps: they count as the process's, but the system drops them when
    memory is short."""
    checkpoint_bytes: int = 0
    """One checkpoint; while the next is written there are two."""
    weights_bytes: int = 0
    sent_bytes: float = 0.0
    """Sent per step by one rank."""


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
        return max(part.once_s for part in parts) + sum((part.seconds or 0.0) - part.once_s for part in parts)

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


def _estimate(run: Run, calibration: Calibration) -> Estimate:
    config, d_model = run.config, run.store.d_model
    if d_model is None:
        return Estimate()
    tokens = run.tokens
    assert tokens is not None, "d_model is known"
    per_token = budget.flops_per_token(config.sae, d_model, config.train.batch_tokens)
    start = _start_seconds(config)
    evaluated = _evaluated_rows(config, d_model)
    trained = _train_seconds(config, d_model, calibration, evaluated)
    # all shards of a replica draw the same rows
    draw_s = calibration.draws.get(run.store.id, 0.0) * config.mesh.shard / _at_once(config)
    drawn = tokens * draw_s
    if trained is not None:
        trained += drawn + evaluated * draw_s
    begin = RUN_START_S + calibration.start_s + sample_rows(config) * draw_s
    memory = budget.memory_bytes(config, d_model)
    checkpoint = budget.checkpoint_bytes(config, d_model)
    own, shared = memory["weights"] + memory["counters"], memory["step"]
    if not planned_on_gpu(config):
        sample = START_BYTES_PER_NUMBER * d_model * sample_rows(config)
        save = SAVE_COPIES * checkpoint // config.mesh.ranks
        shared = _process_bytes(config, calibration) + max(shared, sample, save)
    return Estimate(
        tokens=tokens,
        params=budget.params(config.sae, d_model),
        flops={part: flops * tokens for part, flops in per_token.items()},
        seconds=None if trained is None else start + begin + trained,
        train_s=trained,
        once_s=start + drawn,
        memory_bytes=own + shared,
        shared_bytes=shared,
        checkpoint_bytes=checkpoint,
        weights_bytes=budget.weights_bytes(config, d_model),
        mapped_bytes=0 if planned_on_gpu(config) else round(_mapped_bytes(config.activations, d_model, tokens)),
        sent_bytes=sum(budget.bytes_sent_per_step(config, d_model).values()),
    )


def _mapped_bytes(activations: ActivationsConfig, d_model: int, tokens: float) -> float:
    if activations.kind == "synthetic":
        return 0.0
    return (min(tokens, activations.tokens) + activations.heldout_tokens) * d_model * NUMBER_BYTES[activations.dtype]


def _process_bytes(config: Config, calibration: Calibration) -> int:
    """The launcher trains single runs itself, with all that it has loaded; others get a process of their own."""
    own = config.cluster.name == "local" and config.mesh.ranks == 1
    return calibration.process_bytes if own else PROCESS_BYTES


def _start_seconds(config: Config) -> float:
    """What a job needs before its first step."""
    ranks = config.mesh.ranks
    if config.cluster.name == "slurm":
        return PROCESS_START_S
    return PROCESS_START_S * max(1.0, ranks / cores()) if ranks > 1 else 0.0


def _train_seconds(config: Config, d_model: int, calibration: Calibration, evaluated: int) -> float | None:
    """Steps of a run and evaluations of so many rows, all rows at hand."""
    steps = budget.total_steps(config, d_model)
    if config.cluster.gpu_type:
        gpu = find_gpu(config.cluster.gpu_type)
        step_s = None if gpu is None else step_seconds(gpu, config, d_model)
        if step_s is None:
            return None
        row_s = EVALUATION_OVER_STEP * step_s / config.train.batch_tokens
    else:
        points = calibration.steps.get(kind_of(config))
        if not points:
            return None
        at_once, flops = _at_once(config), step_flops(config, d_model)
        dead = max(0.0, 1 - config.sae.dead_after_tokens / (steps * config.train.batch_tokens))
        dead_step_s = interpolate(calibration.dead_steps[kind_of(config)], flops)
        step_s = ((1 - dead) * interpolate(points, flops) + dead * dead_step_s) / at_once
        batch_s = interpolate(calibration.evaluations[kind_of(config)], evaluation_flops(config, d_model))
        row_s = batch_s / config.train.batch_tokens / at_once
    return steps * step_s + evaluated * row_s


def _evaluated_rows(config: Config, d_model: int) -> int:
    heldout = round(config.activations.heldout_tokens)
    looks = len(evaluation_steps(config, budget.total_steps(config, d_model)))
    return looks * min(config.train.eval_rows, heldout) + heldout


def _at_once(config: Config) -> int:
    """How many times the speed of one process a mesh is expected to reach: ranks on this machine's processor share its
    cores."""
    import torch

    if config.cluster.name == "slurm":
        return config.mesh.ranks
    return max(1, min(config.mesh.ranks, torch.cuda.device_count())) if planned_on_gpu(config) else 1
