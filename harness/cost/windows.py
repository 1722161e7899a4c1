"""What windows cost a plan: the disk that they take and the forwards of the language model."""

from __future__ import annotations

from collections.abc import Sequence

from harness.budget import NUMBER_BYTES
from harness.config import ActivationsConfig
from harness.cost.estimate import Estimates
from harness.process.device import planned_on_gpu
from harness.process.gpus import find_gpu
from harness.record.job import Job
from harness.terminal import duration, si

BLOCK_WEIGHTS = 12
"""Weights of a block over d², in a usual transformer: 4 of attention and 8 of the MLP."""
USED = (0.1, 0.5)
"""Which part of a GPU's peak the language model may reach, from the slowest to the fastest that seems possible: it has
not been measured."""


def window_bytes(config: ActivationsConfig, d_model: int) -> float:
    """Two windows, the most that a job has on the disk."""
    return 2 * config.window_tokens * d_model * NUMBER_BYTES[config.dtype] if config.keep == "window" else 0.0


def language_model_flops(config: ActivationsConfig, d_model: int) -> float:
    """FLOPs of a row, up to the hook."""
    return (config.layer + 1) * (2 * BLOCK_WEIGHTS * d_model**2 + 4 * config.context * d_model)


def window_lines(jobs: Sequence[Job], estimates: Estimates) -> list[str]:
    """A line about the windows of the jobs that have some; empty if none has."""
    costs = [
        (language_model_flops(job.config.activations, d_model) * max(tokens), job)
        for job in jobs
        if job.config.activations.keep == "window"
        and (d_model := job.runs[0].store.d_model) is not None
        and (tokens := [estimate.tokens for run in job.runs if (estimate := estimates.of(run)).tokens is not None])
    ]
    if not costs:
        return []
    flops, job = max(costs, key=lambda cost: cost[0])
    config, d_model = job.config, job.runs[0].store.d_model
    assert d_model is not None
    rows, size = config.activations.window_tokens, window_bytes(config.activations, d_model)
    line = (
        f"windows of {si(rows)} rows, two of them {si(size)}B on the disk of a job; the language model computes "
        f"at most {flops:.1e} FLOPs in a job (if its blocks have {BLOCK_WEIGHTS}·d² weights)"
    )
    gpu = find_gpu(config.cluster.gpu_type) if planned_on_gpu(config) else None
    if gpu is None:
        return [f"{line}; how long that takes is known once it has run, or with cluster.gpu_type=…"]
    ranks = config.mesh.lm
    slow, fast = (flops / (used * gpu.bf16_flops * max(1, ranks)) for used in USED)
    devices = f"{ranks} {gpu.name} (mesh.lm)" if ranks else f"one {gpu.name}"
    low, high = (f"{100 * used:.0f}" for used in USED)
    return [f"{line}: {duration(fast)} to {duration(slow)} at {high} to {low} % of {devices}, beside the training"]
