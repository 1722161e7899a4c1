"""Small runs on synthetic activations, through the same function that the launcher calls."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from harness.activations.open import open_source
from harness.activations.synthetic import Synthetic
from harness.config import Config, from_container
from harness.ops import Ops, choose_ops
from harness.parallel import Shards, Solo
from harness.process.runtime import Runtime
from harness.process.signals import StopFlag
from harness.progress import Progress
from harness.record.job import Job
from harness.record.result import read_result
from harness.record.run import frozen_run
from harness.training.run import train_job

OUT = Path("unused")


def small_config(**changes: Any) -> Config:
    """A cell that trains in a second; `changes` are `sae__k=4`-style settings."""
    container: dict[str, Any] = {
        "sae": {
            "architecture": "topk",
            "n_latents": 64,
            "k": 4,
            "dead_after_tokens": 2000,
            "aux_refresh_steps": 3,
            "aux_k": 8,
        },
        "activations": {
            "kind": "synthetic",
            "dtype": "fp32",
            "heldout_tokens": 1500,
            "synthetic": {"d_model": 16, "n_features": 40, "active_features": 3.0},
        },
        "train": {
            "tokens": 64 * 100,
            "batch_tokens": 64,
            "lr_factor": 1.0,
            "lr": 3e-3,
            "precision": "fp32",
            "dead_window_tokens": 3000,
            "eval_rows": 512,
            "log_every_steps": 10,
            "device": "cpu",
        },
        "tracker": {"name": "none"},
    }
    for name, value in changes.items():
        group, _, key = name.partition("__")
        container[group][key] = value
    return from_container(container)


def source_of(config: Config) -> Synthetic:
    source = open_source(config.activations, OUT, progress=False, stop=StopFlag())
    assert isinstance(source, Synthetic)
    return source


def runtime(
    shards: Shards | None = None,
    ops: Ops | None = None,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
    stop: StopFlag | None = None,
) -> Runtime:
    """One process with the reference kernels, unless told otherwise."""
    return Runtime(device, shards or Solo(), ops or choose_ops("reference"), stop or StopFlag())


def run(directory: Path, config: Config, stop: StopFlag | None = None) -> dict[str, Any]:
    """Train `config` in `directory`, which is made when missing; returns its result."""
    directory.mkdir(parents=True, exist_ok=True)
    job = Job((frozen_run(directory, config),), directory)
    train_job(job, source_of(config), stop or StopFlag(), Progress(io.StringIO()))
    result = read_result(directory)
    assert result is not None
    return result
