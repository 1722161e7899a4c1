"""Small runs on synthetic activations, through the same function that the launcher calls."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from harness.activations.open import open_source
from harness.activations.synthetic import Synthetic
from harness.config import Config, from_container
from harness.process.signals import StopFlag
from harness.terminal import Progress
from harness.training.run import Start, run_cells

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


def run(directory: Path, config: Config, stop: StopFlag | None = None) -> dict[str, Any]:
    """Train `config` in `directory`, which is made when missing."""
    directory.mkdir(parents=True, exist_ok=True)
    start = Start(directory, config, 1)
    where = directory / "checkpoints"
    return run_cells([start], where, source_of(config), stop or StopFlag(), Progress(io.StringIO()))[0]
