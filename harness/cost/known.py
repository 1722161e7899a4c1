"""Times of training steps that are known without training: of runs that have ended, of an earlier `--calibrate`, or
else from data sheets. Every one says where it comes from and how far it may be off."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness import budget
from harness.config import Config
from harness.cost.calibrate import (
    DRAW_S_PER_NUMBER,
    Calibration,
    Timed,
    cores,
    evaluation_flops,
    interpolate,
    kind_of,
    place_of,
    step_flops,
    threads_of,
)
from harness.cost.step_time import step_seconds
from harness.errors import UserError
from harness.process.device import planned_on_gpu
from harness.process.gpus import Gpu, find_gpu, known_gpus
from harness.record import names
from harness.record.provenance import cpu_name
from harness.record.result import read_result
from harness.record.run import Run
from harness.record.rundir import read_config
from harness.record.sweepdir import read_plan
from harness.schema import TEXT, fields, read_json

MOST_ENDED = 64
"""Ended runs of a sweep that are read, the newest first."""
LEAST_STEPS = 10
"""Shorter runs tell too little of a step."""

EVALUATION_OVER_STEP = 0.5
"""Cost of evaluating a row over training on it: an evaluation has no gradients and no update."""

CPU_FLOPS_PER_S = 5e10
"""Assumed for one CPU thread. Two threads of an EPYC with AVX-512 reached 1.2e11 to 1.4e11 (docs/scaling.md)."""
CPU_STEP_S = 1e-3
"""The shortest step on a CPU."""
ASSUMED_GPU = "a100"
"""Where a job gets a GPU and nobody said which."""


_MACHINE = fields({"machine": fields({"cpu": TEXT})})


class Known(NamedTuple):
    step_s: float
    """Seconds of a training step of the whole mesh."""
    row_s: float
    """Seconds to evaluate a held-out row."""
    draw_s: float
    """Seconds to draw a row of synthetic activations, where `step_s` leaves it out."""
    source: str
    """Where the numbers come from, and how far they may be off."""


Ended = dict[tuple[Any, ...], list[Timed]]
"""By `_key`: executed FLOPs of a step and its seconds, drawing of rows included, FLOPs ascending."""


def ended_runs(runs: Iterable[Run]) -> Ended:
    """Steps of the newest ended runs in the sweeps of `runs`, at the place of each."""
    found: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for sweep_dir in dict.fromkeys(run.sweep_dir for run in runs):
        for run_dir in _newest(sweep_dir):
            try:
                result, config = read_result(run_dir) or {}, read_config(run_dir)
                here = config.cluster.name != "local" or _made_here(run_dir)
            except (UserError, FileNotFoundError):
                continue
            speed, d_model = result.get("tokens_per_s"), result.get("d_model")
            if here and speed and d_model and (result.get("steps") or 0) >= LEAST_STEPS:
                key = _key(config, config.activations.store)
                step_s = config.train.batch_tokens / speed
                found.setdefault(key, {}).setdefault(step_flops(config, d_model), []).append(step_s)
    return {
        key: [Timed(flops, statistics.median(seconds)) for flops, seconds in sorted(points.items())]
        for key, points in found.items()
    }


def _made_here(run_dir: Path) -> bool:
    machine = read_json(run_dir / names.PROVENANCE, _MACHINE, "")["machine"]
    return machine["cpu"] == cpu_name()


def _newest(sweep_dir: Path) -> list[Path]:
    results = [(path.stat().st_mtime, path.parent) for path in sweep_dir.glob(f"*/{names.RESULT}")]
    return [run_dir for _, run_dir in sorted(results, reverse=True)[:MOST_ENDED]]


def _key(config: Config, store: str) -> tuple[Any, ...]:
    """What two runs must share so that their steps differ only in size."""
    mesh, objective = config.mesh, config.train.objective
    return (*kind_of(config), *place_of(config), mesh.dp, mesh.shard, store, objective)


def earlier_calibration(runs: Sequence[Run]) -> Calibration:
    """What the last `--calibrate` of these sweeps measured at the place of `runs`; empty if there was none."""
    for sweep_dir in dict.fromkeys(run.sweep_dir for run in runs):
        try:
            entries = read_plan(sweep_dir)["calibrations"]
        except UserError:
            continue  # `record_intent` will say so
        for facts in reversed(entries):
            found = Calibration.of_facts(facts)
            if found is not None and found.place == place_of(runs[0].config):
                return found
    return Calibration()


def known(run: Run, d_model: int, ended: Ended, calibration: Calibration) -> Known | str:
    """The times of a run from the best source there is; or why there is none, in a line."""
    config = run.config
    batch, flops = config.train.batch_tokens, step_flops(config, d_model)
    if points := ended.get(_key(config, run.store.id)):
        step_s = interpolate(points, flops)
        source = f"from {len(points)} size{'s' if len(points) > 1 else ''} of ended runs of this sweep"
        return Known(step_s, EVALUATION_OVER_STEP * step_s / batch, 0.0, source)
    if config.train.objective != "local":
        return f"no run with train.objective={config.train.objective} has ended in this sweep, so its time is unknown"
    if points := calibration.steps.get(kind_of(config)):
        steps = budget.total_steps(config, d_model)
        dead = max(0.0, 1 - config.sae.dead_after_tokens / (steps * batch))
        dead_step_s = interpolate(calibration.dead_steps[kind_of(config)], flops)
        step_s = (1 - dead) * interpolate(points, flops) + dead * dead_step_s
        batch_s = interpolate(calibration.evaluations[kind_of(config)], evaluation_flops(config, d_model))
        draw_s = calibration.draws.get(run.store.id, 0.0)
        return Known(step_s / at_once(config), batch_s / batch / at_once(config), draw_s, calibration.source)
    return _from_data_sheet(config, d_model, flops)


def _from_data_sheet(config: Config, d_model: int, flops: float) -> Known | str:
    synthetic = config.activations.synthetic
    numbers = synthetic.n_features + synthetic.d_model
    draw_s = DRAW_S_PER_NUMBER * numbers if config.activations.kind == "synthetic" else 0.0
    if not (config.cluster.gpu_type or planned_on_gpu(config)):
        threads = threads_of(config) or cores()
        step_s = max(flops / (CPU_FLOPS_PER_S * threads), CPU_STEP_S) / at_once(config)
        source = f"assumed {CPU_FLOPS_PER_S / 1e9:.0f} GFLOP/s per CPU thread, within a factor of 5"
    else:
        gpu, source = _gpu_of(config)
        if gpu is None:
            return source
        found = step_seconds(gpu, config, d_model)
        if found is None:
            return f"no figures of {gpu.name} for train.precision={config.train.precision}"
        step_s = found
    return Known(step_s, EVALUATION_OVER_STEP * step_s / config.train.batch_tokens, draw_s, source)


def _gpu_of(config: Config) -> tuple[Gpu | None, str]:
    """The GPU that a run will train on, and where its figures come from; or why there are none."""
    name = config.cluster.gpu_type
    if not name and config.cluster.name == "local":
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    gpu = find_gpu(name or ASSUMED_GPU)
    if gpu is None:
        return None, f"no figures for cluster.gpu_type={name}; known: {known_gpus()}"
    if not name:
        return gpu, f"data sheet of {gpu.name}, since cluster.gpu_type names none: within a factor of 5"
    return gpu, f"data sheet of {gpu.name}, unmeasured: within a factor of 2.5"


def at_once(config: Config) -> int:
    """Expected speed of the mesh over that of one process: local ranks on the CPU share its cores."""
    import torch

    if config.cluster.name == "slurm":
        return config.mesh.training_ranks
    return max(1, min(config.mesh.training_ranks, torch.cuda.device_count())) if planned_on_gpu(config) else 1
