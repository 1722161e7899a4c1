"""Time real training steps of a few cells on this machine; the times of the others are interpolated. Only `--calibrate`
does this."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil

from harness import budget
from harness.config import Config, MeshConfig
from harness.process.device import planned_on_gpu
from harness.record.provenance import machine, now
from harness.record.run import Run
from harness.schema import ANYTHING, TEXT, dict_of, fields, list_of, number

SHAPES = 6
"""At most this many shapes are timed, unless there are more kinds of cells."""

SHAPE_S = 0.25
"""The most seconds for one of them, not counting the time to load kernels."""

CALIBRATION_SHARE = 0.02
"""Calibration may take this share of the training time at `ASSUMED_FLOPS_PER_S`."""

ASSUMED_FLOPS_PER_S = 1e11
MOST_S = 5.0
"""After this many seconds, only kinds of cells without a timed shape are timed."""

MOST_STEP_FLOPS = 1e10
"""Larger steps are timed with a smaller batch, then with fewer latents."""

LEAST_BATCH = 256
"""The batch is not made smaller than this."""

DEAD_SHARES = {"switch": 0.1}
DEAD_SHARE = 0.02
"""Architecture -> assumed share of dead latents once a run has passed `sae.dead_after_tokens`; AuxK works on these. The
values come from the default study (docs/lab-log.md); `DEAD_SHARE` is for the others."""

START_BYTES_PER_NUMBER = 20
"""Memory of the sample that sets the normalisation and the initial centre: once in float32, twice in float64."""

PROBE_SHARE = 0.5
"""A plan uses at most this share of the memory of this machine."""

MOST_DRAWN = 1e8
"""A plan does not draw from dictionaries with more numbers than this."""

PROCESS_BYTES = 450_000_000
"""Memory of a process with interpreter, torch and compiled kernels."""


START_S = 1.0
"""Assumed seconds that a run needs before its first step, where that was not measured."""

DRAW_S_PER_NUMBER = 1e-8
"""Assumed seconds to draw a row of synthetic activations, per feature and dimension."""


class Timed(NamedTuple):
    """A measured point: FLOPs of what was timed, and seconds."""

    flops: float
    seconds: float


@dataclass
class Calibration:
    """Measured times from which the time of every run is estimated."""

    source: str = ""
    """Where the times come from, in words; empty if there are none."""
    problem: str = ""
    """Why some or all times are missing; empty if none are."""
    time: str = ""
    """When it was made, ISO 8601."""
    seconds: float = 0.0
    """Duration of the calibration."""
    start_s: float = START_S
    """Seconds that a run needs before its first step, without drawing its sample."""
    process_bytes: int = PROCESS_BYTES
    """Memory of the process before anything is trained."""
    steps: dict[tuple[Any, ...], list[Timed]] = field(default_factory=dict)
    """Kind of cell (`kind_of`) -> timed training steps, FLOPs ascending."""
    dead_steps: dict[tuple[Any, ...], list[Timed]] = field(default_factory=dict)
    """The same steps with `DEAD_SHARES` of the latents dead. The FLOPs do not count AuxK."""
    evaluations: dict[tuple[Any, ...], list[Timed]] = field(default_factory=dict)
    """Kind of cell -> timed reconstructions of a batch."""
    draws: dict[str, float] = field(default_factory=dict)
    """Store id -> seconds to draw one row of synthetic activations."""
    place: tuple[str, ...] = ()
    """Where it was measured (`place_of`)."""

    def facts(self) -> dict[str, Any]:
        """The calibration as JSON values, for plan.json."""
        words = {"source": self.source, "problem": self.problem, "time": self.time, "seconds": self.seconds}
        measured = {"steps": self.steps, "dead_steps": self.dead_steps, "evaluations": self.evaluations}
        points = {
            name: [{"kind": list(kind), **point._asdict()} for kind, points in by_kind.items() for point in points]
            for name, by_kind in measured.items()
        }
        return {**words, "place": list(self.place), "start_s": self.start_s, "draws": self.draws, **points}

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> Calibration | None:
        """The measured calibration that `facts` describes; None if nothing was measured, or an earlier version did."""
        try:
            _FACTS(facts, "")
        except ValueError:
            return None
        if not facts["steps"] or not facts["place"]:
            return None
        found = cls(facts["source"], time=facts["time"], start_s=facts["start_s"], draws=facts["draws"])
        found.place = tuple(facts["place"])
        for name in ("steps", "dead_steps", "evaluations"):
            for point in facts[name]:
                timed = Timed(point["flops"], point["seconds"])
                getattr(found, name).setdefault(tuple(point["kind"]), []).append(timed)
        return found


_POINTS = list_of(fields({"kind": list_of(ANYTHING), "flops": number(0), "seconds": number(0)}))
_FACTS = fields(
    {"source": TEXT, "time": TEXT, "place": list_of(TEXT), "start_s": number(0), "draws": dict_of(number(0))}
    | dict.fromkeys(("steps", "dead_steps", "evaluations"), _POINTS)
)


def sample_rows(config: Config) -> int:
    """Rows of the sample that sets the normalisation and the initial centre."""
    from harness.activations.source import SAMPLE_ROWS

    activations = config.activations
    return SAMPLE_ROWS if activations.kind == "synthetic" else min(SAMPLE_ROWS, round(activations.tokens))


def cores() -> int:
    """CPU threads that torch uses here."""
    import torch

    return torch.get_num_threads()


def threads_of(config: Config) -> int:
    """CPU threads of the run, at most as many as this machine has; 0 leaves the choice to torch."""
    if config.train.threads or config.cluster.name != "slurm" or planned_on_gpu(config):
        return config.train.threads
    return min(config.cluster.cpus_per_task, os.cpu_count() or 1)


def kind_of(config: Config) -> tuple[Any, ...]:
    """What two cells must share to differ only in size: their times can then be interpolated."""
    train = config.train
    return (config.sae.architecture, train.precision, train.device, threads_of(config), config.ops)


def place_of(config: Config) -> tuple[str, ...]:
    """Where a run trains, as far as its configuration tells."""
    cluster = config.cluster
    return (cluster.name, cluster.gpu_type, cluster.partition)


def _executed(config: Config, d_model: int) -> dict[str, float]:
    """FLOPs per token of a step without dead latents, by part. One kernel set's rule serves for all of them: this is
    the axis that timings lie on."""
    from harness.ops import reference

    train = config.train
    dense = reference.dense_rows_per_k(train.precision)
    return budget.flops_executed_per_token(
        config.sae, d_model, train.batch_tokens, 0, dense, train.optimizer, train.peers
    )


def step_flops(config: Config, d_model: int) -> float:
    """Executed FLOPs of one training step without dead latents."""
    return sum(_executed(config, d_model).values()) * config.train.batch_tokens


def evaluation_flops(config: Config, d_model: int) -> float:
    """Executed FLOPs to reconstruct one batch."""
    parts = _executed(config, d_model)
    return sum(parts[name] for name in ("encoder", "selection", "decode", "router")) * config.train.batch_tokens


def interpolate(points: Sequence[Timed], flops: float) -> float:
    """Seconds at `flops`: linear in log-log between the points, constant below them, proportional to FLOPs above."""
    if flops <= points[0].flops:
        return points[0].seconds
    for left, right in itertools.pairwise(points):
        if flops <= right.flops:
            share = math.log(flops / left.flops) / math.log(right.flops / left.flops)
            return left.seconds * (right.seconds / left.seconds) ** share
    return points[-1].seconds * flops / points[-1].flops


def calibrate(runs: Sequence[Run]) -> Calibration:
    """Time real steps of a few of the runs on this machine; `problem` says what cannot be timed."""
    calibration = Calibration(time=now())
    here = [run for run in runs if run.store.d_model is not None]
    if here:
        calibration.place = place_of(here[0].config)
        begin = time.perf_counter()
        try:
            calibration.source = _calibrate_here(here, calibration)
        except (RuntimeError, ValueError, MemoryError) as error:
            calibration.problem = f"steps could not be timed here: {' '.join(str(error).split())}"
        calibration.seconds = time.perf_counter() - begin
    return calibration


def _calibrate_here(runs: Sequence[Run], calibration: Calibration) -> str:
    """Fill in `calibration`; returns what was measured, in words."""
    from harness.cost.speed import measure_draw, measure_speed, measure_start
    from harness.process.memory import reset_peak

    load = os.getloadavg()[0]
    shapes = [(config, d_model) for config, d_model in probes(runs) if _fits_here(config, d_model)]
    if not shapes:
        raise MemoryError("they need more than half of the memory of this machine")
    flops = sum(
        step_flops(run.config, run.store.d_model or 0) * budget.total_steps(run.config, run.store.d_model or 1)
        for run in runs
    )
    seconds = min(SHAPE_S, CALIBRATION_SHARE * flops / ASSUMED_FLOPS_PER_S / len(shapes))
    first, d_model = shapes[0]
    calibration.start_s = measure_start(first, d_model, sample_rows(first))
    deadline = time.perf_counter() + MOST_S
    for config, d_model in shapes:
        kind, flops = kind_of(config), step_flops(config, d_model)
        if kind in calibration.steps and time.perf_counter() > deadline:
            continue
        speed = measure_speed(config, d_model, seconds, DEAD_SHARES.get(config.sae.architecture, DEAD_SHARE))
        calibration.steps.setdefault(kind, []).append(Timed(flops, speed.step_s))
        calibration.dead_steps.setdefault(kind, []).append(Timed(flops, speed.dead_step_s))
        evaluation = Timed(evaluation_flops(config, d_model), speed.evaluation_s)
        calibration.evaluations.setdefault(kind, []).append(evaluation)
    drawn = {run.store.id: run.config for run in runs if run.config.activations.kind == "synthetic"}
    for store, config in drawn.items():
        synthetic = config.activations.synthetic
        if synthetic.n_features * max(synthetic.d_model, synthetic.active_features) > MOST_DRAWN:
            continue
        enough = calibration.draws and time.perf_counter() > deadline
        calibration.draws[store] = max(calibration.draws.values()) if enough else measure_draw(config, seconds)
    for by_kind in (calibration.steps, calibration.dead_steps, calibration.evaluations):
        for points in by_kind.values():
            points.sort()
    calibration.process_bytes = psutil.Process().memory_info().rss
    reset_peak()
    about, threads = machine(), first.train.threads or cores()
    processor = (
        about["gpus"][0]
        if about["gpus"] and planned_on_gpu(first)
        else f"{about['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    )
    others = f" (busy with other work: load {load:.1f})" if load > 0.5 * (os.cpu_count() or 1) else ""
    timed = sum(map(len, calibration.steps.values()))
    return f"{timed} shape{'s' if timed > 1 else ''} timed on {processor}{others}"


def probes(runs: Iterable[Run]) -> list[tuple[Config, int]]:
    """(configuration, d_model) of the steps to time: quantiles of FLOPs of each kind of cell, made smaller if they
    would take too long."""
    kinds: dict[tuple[Any, ...], dict[float, tuple[Config, int]]] = {}
    for run in runs:
        # of an end-to-end objective only the SAE's own part is timed, and `known` does not use it
        train = dataclasses.replace(run.config.train, objective="local")
        config, d_model = dataclasses.replace(run.config, train=train), run.store.d_model or 0
        kinds.setdefault(kind_of(config), {})[step_flops(config, d_model)] = (config, d_model)
    each = max(1, SHAPES // len(kinds))
    chosen: dict[tuple[Any, ...], tuple[Config, int]] = {}
    for kind, cells in kinds.items():
        ordered = [cells[flops] for flops in sorted(cells)]
        count = min(each, len(ordered))
        places = {round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)}
        for place in sorted(places):
            config, d_model = ordered[place]
            small = _smaller(config, d_model)
            chosen[(kind, step_flops(small, d_model))] = (small, d_model)
    return list(chosen.values())


def _fits_here(config: Config, d_model: int) -> bool:
    """Whether this machine has the memory to time a configuration: its steps, and the sample that it starts with."""
    needed = sum(budget.memory_bytes(config, d_model, 0, 0).values())
    needed += START_BYTES_PER_NUMBER * d_model * sample_rows(config)
    return needed <= PROBE_SHARE * psutil.virtual_memory().total


def _smaller(config: Config, d_model: int) -> Config:
    """The configuration for one process, with the threads of the run and a step of at most `MOST_STEP_FLOPS`; without
    peers, whose part of a step is products like the others."""
    train = dataclasses.replace(config.train, threads=threads_of(config), mfr_weight=0.0)
    config = dataclasses.replace(config, mesh=MeshConfig(), train=train)
    while step_flops(config, d_model) > MOST_STEP_FLOPS:
        sae, train = config.sae, config.train
        least = sae.k or sae.target_l0 or 1
        if train.batch_tokens >= 2 * LEAST_BATCH:
            config = dataclasses.replace(config, train=dataclasses.replace(train, batch_tokens=train.batch_tokens // 2))
        elif (half := sae.n_latents // 2 // sae.n_experts * sae.n_experts) >= 8 * least * sae.n_experts:
            config = dataclasses.replace(config, sae=dataclasses.replace(sae, n_latents=half))
        else:
            break
    return config
