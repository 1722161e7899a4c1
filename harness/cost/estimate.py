"""The expected cost of a run: time, FLOPs, memory, disk. Nothing is trained for it: `cost.known` has the times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    sample_rows,
)
from harness.cost.known import Known, at_once, earlier_calibration, ended_runs, known
from harness.process.device import planned_on_gpu
from harness.record.job import Job
from harness.record.provenance import now
from harness.record.result import unfinished
from harness.record.run import Run
from harness.training.schedule import evaluation_steps

PROCESS_START_S = 6.0
"""Seconds to load interpreter, torch, kernels and store, for a job that starts processes of its own."""

RUN_START_S = 0.5
"""Seconds for record, tracker and final weights of a run, in addition to the timed start."""

HARVEST_BYTES = 205_000_000
"""Memory of the modules that a language model needs, which stay in a process that has harvested."""


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
    host_bytes: int = 0
    """Of a rank on a GPU, the least memory of its process (`host_memory`)."""
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


def estimate(runs: Sequence[Run], *, measure: bool = False) -> Estimates:
    """Estimates of all runs. Times come from `cost.known`; with `measure` a few steps are timed on this machine now."""
    to_do = [run for run in unfinished(runs) if run.store.d_model is not None]
    calibration = calibrate(to_do) if measure else earlier_calibration(to_do)
    ended = {} if measure else ended_runs(to_do)
    times = {run.run_dir: known(run, run.store.d_model or 0, ended, calibration) for run in to_do}
    shown = calibration if measure else Calibration(time=now(), start_s=calibration.start_s)
    found = [each.source for each in times.values() if isinstance(each, Known)]
    shown.source = "; ".join(dict.fromkeys(found))
    shown.problem = "; ".join(dict.fromkeys([*filter(None, [shown.problem]), *_reasons(times.values())]))
    by_dir = {run.run_dir: _estimate(run, times.get(run.run_dir), calibration) for run in runs}
    return Estimates(shown, by_dir)


def _reasons(times: Iterable[Known | str]) -> list[str]:
    return [each for each in times if isinstance(each, str)]


def _estimate(run: Run, times: Known | str | None, calibration: Calibration) -> Estimate:
    config, d_model = run.config, run.store.d_model
    if d_model is None:
        return Estimate()
    tokens = run.tokens
    assert tokens is not None, "d_model is known"
    train = config.train
    per_token = budget.flops_per_token(config.sae, d_model, train.batch_tokens, train.optimizer, train.peers)
    start = _start_seconds(config)
    evaluated = _evaluated_rows(config, d_model)
    steps = budget.total_steps(config, d_model)
    trained = steps * times.step_s + evaluated * times.row_s if isinstance(times, Known) else None
    # every shard of a replica draws the same rows
    draw_s = times.draw_s * config.mesh.shard / at_once(config) if isinstance(times, Known) else 0.0
    drawn = tokens * draw_s
    if trained is not None:
        trained += drawn + evaluated * draw_s
    begin = RUN_START_S + calibration.start_s + sample_rows(config) * draw_s
    own, shared = own_and_shared(run, d_model, calibration.process_bytes)
    return Estimate(
        tokens=tokens,
        params=budget.params(config.sae, d_model),
        flops={part: flops * tokens for part, flops in per_token.items()},
        seconds=None if trained is None else start + begin + trained,
        train_s=trained,
        once_s=start + drawn,
        memory_bytes=own + shared,
        host_bytes=host_memory(config, d_model) if planned_on_gpu(config) else 0,
        shared_bytes=shared,
        checkpoint_bytes=budget.checkpoint_bytes(config, d_model),
        weights_bytes=budget.weights_bytes(config, d_model),
        mapped_bytes=0 if planned_on_gpu(config) else round(_mapped_bytes(config.activations, d_model, tokens)),
        sent_bytes=sum(budget.bytes_sent_per_step(config, d_model).values()),
    )


def own_and_shared(run: Run, d_model: int, process_bytes: int) -> tuple[int, int]:
    """Peak bytes of one rank: what each run of a pack holds, and what they hold one after the other, the process
    included where there is no GPU. `process_bytes`: of the launcher."""
    config = run.config
    memory = rank_memory(config, d_model)
    own, shared = memory["weights"] + memory["counters"], memory["step"]
    if planned_on_gpu(config):
        return own, shared
    # the sample is gone before moments and gradients exist; both matrices and the directions that they begin with do
    word = budget.word_bytes(config.train)
    matrices = 3 * word * config.sae.n_latents * d_model // config.mesh.shard
    start = START_BYTES_PER_NUMBER * d_model * sample_rows(config) + matrices - own
    if config.sae.traits.penalty == "tanh":
        latents = min(budget.BIAS_ROWS, config.sae.n_latents // config.mesh.shard)
        start += 2 * word * sample_rows(config) * latents
    # what the steps have freed is still there when a checkpoint is written
    save = min(shared, budget.KEPT_BYTES) + 2 * round(budget.largest_file(config, d_model))
    needed = max(shared, start, save)
    return own, _process_bytes(run, process_bytes) + needed


def host_memory(config: Config, d_model: int) -> int:
    """Bytes of the process of a rank on a GPU, beside what CUDA and mapped rows take: itself, and the most of the
    sample that it begins with, a file of a checkpoint, which is copied from the GPU and put together, and a file of the
    final weights."""
    sample = START_BYTES_PER_NUMBER * d_model * sample_rows(config)
    checkpoint = 3 * round(budget.largest_file(config, d_model))
    weights = round(min(budget.weights_bytes(config, d_model), budget.WEIGHTS_FILE_BYTES))
    return PROCESS_BYTES + max(sample, checkpoint, weights)


def rank_memory(config: Config, d_model: int) -> dict[str, int]:
    """`gpu_memory`, or on a CPU `budget.memory_bytes` with what the kernels hold for each thread of the run."""
    if planned_on_gpu(config):
        from harness.cost.gpu_memory import gpu_memory

        return gpu_memory(config, d_model)
    from harness.ops.cpu.arrays import TILE_ELEMENTS

    word = budget.word_bytes(config.train)
    on_cluster = config.cluster.name == "slurm"
    threads = config.train.threads or (config.cluster.cpus_per_task if on_cluster else cores())
    # how many entries each thread has of each latent, where they begin, and where the next one goes
    sort = threads * 3 * 8 * config.sae.n_latents // config.mesh.shard
    return budget.memory_bytes(config, d_model, threads * TILE_ELEMENTS * word, sort)


def _mapped_bytes(activations: ActivationsConfig, d_model: int, tokens: float) -> float:
    if activations.kind == "synthetic":
        return 0.0
    rows = min(tokens, activations.tokens) if activations.keep == "store" else 2 * activations.window_tokens
    return (rows + activations.heldout_tokens) * d_model * budget.NUMBER_BYTES[activations.dtype]


def _process_bytes(run: Run, launcher: int) -> int:
    """Memory of the process before training: the launcher trains local single-rank runs itself, with all that it has
    loaded; other runs get new processes."""
    from harness.activations.store.paths import is_complete, store_root

    config = run.config
    if config.cluster.name != "local" or config.mesh.ranks > 1:
        return PROCESS_BYTES
    activations = config.activations
    harvests = activations.kind != "synthetic" and activations.keep == "store"
    if harvests and not is_complete(store_root(activations, Path(config.out)) / run.store.id):
        return launcher + HARVEST_BYTES
    return launcher


def _start_seconds(config: Config) -> float:
    """Seconds to start the processes of a job."""
    ranks = config.mesh.ranks
    if config.cluster.name == "slurm":
        return PROCESS_START_S
    return PROCESS_START_S * max(1.0, ranks / cores()) if ranks > 1 else 0.0


def _evaluated_rows(config: Config, d_model: int) -> int:
    """Rows of all evaluations of a run, the final one on every held-out row included."""
    heldout = round(config.activations.heldout_tokens)
    evaluations = len(evaluation_steps(config, budget.total_steps(config, d_model)))
    return evaluations * min(config.train.eval_rows, heldout) + heldout
