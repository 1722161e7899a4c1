"""What a process takes that trains a run on the CPU, computing on random rows."""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from harness import budget
from harness.bench.phases import FakeRows, Phases, phases
from harness.config import Config, SaeConfig
from harness.cost.calibrate import PROCESS_BYTES
from harness.cost.estimate import own_and_shared
from harness.ops import choose_ops
from harness.process.memory import peak_bytes, reset_peak
from harness.process.runtime import alone
from harness.record.run import Run

CPU = torch.device("cpu")

LOADED_BY = SaeConfig(architecture="topk", n_latents=256, k=8)
"""An SAE of which a step loads the kernels."""


def resident(run: Run) -> Phases:
    """Peak resident memory of a process that trains this run alone, and what the plan says; both without a harvest and
    the rows that are mapped."""
    d_model = run.store.d_model or 0
    # a fresh process, since nobody can say what an earlier run has left in this one
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_measure, run.config, d_model).result()
    there = dataclasses.replace(run.config.activations, kind="synthetic")
    computed = dataclasses.replace(run, config=dataclasses.replace(run.config, activations=there))
    return Phases(sum(own_and_shared(computed, d_model, PROCESS_BYTES)), found)


def _measure(config: Config, d_model: int) -> dict[str, int]:
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    runtime = alone(CPU, choose_ops(config.ops, CPU))
    source = FakeRows(d_model, 2 * budget.EVALUATION_BATCH, torch.randn)
    # a process that trains many runs has loaded its kernels
    small = dataclasses.replace(config, sae=LOADED_BY, train=dataclasses.replace(config.train, batch_tokens=64))
    for _ in phases(small, FakeRows(d_model, 64, torch.randn, 64), runtime):
        pass
    reset_peak()
    found = {"process": peak_bytes()}
    with tempfile.TemporaryDirectory() as folder:
        for phase in phases(config, source, runtime, Path(folder)):
            found[phase] = peak_bytes()
            reset_peak()
    return found
