"""The expected cost of a run: time, FLOPs, memory, disk. Times come from steps timed on this machine or, if
`cluster.gpu_type` names a GPU, from its data sheet (`harness.process.gpus`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import budget
from harness.config import ActivationsConfig, Config
from harness.cost.calibrate import (
    PROCESS_BYTES,
    START_BYTES_PER_NUMBER,
    Calibration,
    calibrate,
    cores,
    evaluation_flops,
    interpolate,
    kind_of,
    sample_rows,
    step_flops,
)
from harness.cost.step_time import step_seconds
from harness.process.device import planned_on_gpu
from harness.process.gpus import find_gpu
from harness.record.job import Job
from harness.record.result import unfinished
from harness.record.run import Run
from harness.training.schedule import evaluation_steps

PROCESS_START_S = 6.0
"""Seconds to load interpreter, torch, kernels and store, for a job that starts processes of its own."""

RUN_START_S = 0.5
"""Seconds for record, tracker and final weights of a run, in addition to the timed start."""

EVALUATION_OVER_STEP = 0.5
"""Cost of evaluating a row over training on it: an evaluation has no gradients and no update."""

SAVE_COPIES = 2
"""Writing a checkpoint needs this many times its size in memory, in addition to the state."""

NUMBER_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""dtype of a store -> bytes of a number."""


@dataclass(frozen=True)
class Estimate:
    """The cost of one run that is trained alone, from the beginning. None: the width or the speed is unknown."""

    tokens: int | None = None
    params: int | None = None
    flops: dict[str, float] = field(default_factory=dict)
    """Part of the step -> FLOPs of the whole run, in closed form."""
    seconds: float | None = None
    """Start, training and evaluations; an upper bound if `train.until=convergence`."""
    train_s: float | None = None
    """The part of `seconds` that `result.json` counts as `wall_s`: steps and evaluations."""
    once_s: float = 0.0
    """The part of `seconds` that a job pays once for all its runs: to start processes and to draw the stream."""
    memory_bytes: int | None = None
    """Peak of one rank: of its GPU if it has one, else of its process."""
    shared_bytes: int = 0
    """The part of `memory_bytes` that the runs of a pack use one after the other."""
    mapped_bytes: int = 0
    """Rows of the store, read through memory maps. They count towards the process, but the system drops them if memory
    is short."""
    checkpoint_bytes: int = 0
    """Size of one checkpoint; there are two while the next one is written."""
    weights_bytes: int = 0
    sent_bytes: float = 0.0
    """Bytes that one rank sends per step."""


@dataclass
class Estimates:
    """The expected cost of the runs of a sweep."""

    calibration: Calibration
    by_dir: dict[Path, Estimate]
    """Run directory -> estimate."""

    def of(self, run: Run) -> Estimate:
        return self.by_dir[run.run_dir]

    def seconds_of(self, run: Run) -> float | None:
        return self.by_dir[run.run_dir].seconds

    def job_seconds(self, job: Job) -> float | None:
        """Seconds of a job, which trains its runs on one stream; None if the time of a run is unknown."""
        parts = [self.of(run) for run in job.runs]
        if any(part.seconds is None for part in parts):
            return None
        return max(part.once_s for part in parts) + sum((part.seconds or 0.0) - part.once_s for part in parts)

    def job_memory(self, job: Job) -> int | None:
        """Peak memory of one rank of the job, in bytes: the own parts of all runs plus the largest shared part; None if
        a run's is unknown."""
        parts = [self.of(run) for run in job.runs]
        if any(part.memory_bytes is None for part in parts):
            return None
        own = sum((part.memory_bytes or 0) - part.shared_bytes for part in parts)
        return own + max(part.shared_bytes for part in parts)


def estimate(runs: Sequence[Run]) -> Estimates:
    """Estimates of all runs. Takes a few seconds for a calibration unless every run has ended or names its GPU type."""
    calibration = calibrate(unfinished(runs))
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
    # every shard of a replica draws the same rows
    draw_s = calibration.draws.get(run.store.id, 0.0) * config.mesh.shard / _at_once(config)
    drawn = tokens * draw_s
    if trained is not None:
        trained += drawn + evaluated * draw_s
    begin = RUN_START_S + calibration.start_s + sample_rows(config) * draw_s
    memory = rank_memory(config, d_model)
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


def rank_memory(config: Config, d_model: int) -> dict[str, int]:
    """`budget.memory_bytes` with what the kernels hold: on a GPU, else on a CPU in two threads."""
    if planned_on_gpu(config):
        from harness.ops import sizes

        return budget.memory_bytes(
            config, d_model, sizes.TILE_BYTES, sizes.bytes_per_token(round(budget.active(config.sae)), d_model)
        )
    from harness.ops.cpu.arrays import TILE_ELEMENTS

    word = 8 if config.train.precision == "fp64" else 4
    return budget.memory_bytes(config, d_model, 2 * TILE_ELEMENTS * word, 0)


def _mapped_bytes(activations: ActivationsConfig, d_model: int, tokens: float) -> float:
    if activations.kind == "synthetic":
        return 0.0
    rows = min(tokens, activations.tokens) if activations.keep == "store" else 2 * activations.window_tokens
    return (rows + activations.heldout_tokens) * d_model * NUMBER_BYTES[activations.dtype]


def _process_bytes(config: Config, calibration: Calibration) -> int:
    """Memory of the process before training: the launcher trains local single-rank runs itself, with all that it has
    loaded; other runs get new processes."""
    own = config.cluster.name == "local" and config.mesh.ranks == 1
    return calibration.process_bytes if own else PROCESS_BYTES


def _start_seconds(config: Config) -> float:
    """Seconds to start the processes of a job."""
    ranks = config.mesh.ranks
    if config.cluster.name == "slurm":
        return PROCESS_START_S
    return PROCESS_START_S * max(1.0, ranks / cores()) if ranks > 1 else 0.0


def _train_seconds(config: Config, d_model: int, calibration: Calibration, evaluated: int) -> float | None:
    """Seconds for the steps of a run and for evaluations of `evaluated` rows, without drawing rows; None if unknown."""
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
    """Rows of all evaluations of a run, the final one on every held-out row included."""
    heldout = round(config.activations.heldout_tokens)
    evaluations = len(evaluation_steps(config, budget.total_steps(config, d_model)))
    return evaluations * min(config.train.eval_rows, heldout) + heldout


def _at_once(config: Config) -> int:
    """Expected speed of the mesh over that of one process: local ranks on the CPU share its cores."""
    import torch

    if config.cluster.name == "slurm":
        return config.mesh.ranks
    return max(1, min(config.mesh.ranks, torch.cuda.device_count())) if planned_on_gpu(config) else 1
