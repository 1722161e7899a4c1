"""A cell that trains in about a second, and what it is asked for with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

TINY = (
    "activations=synthetic",
    "activations.synthetic.d_model=16",
    "activations.synthetic.n_features=32",
    "activations.heldout_tokens=512",
    "train.tokens=4096",
    "train.batch_tokens=256",
    "train.warmup_tokens=0",
    "train.eval_points=2",
    "train.eval_rows=256",
    "train.log_every_steps=4",
    "train.threads=1",
    "ops=reference",
    "tracker=none",
    "sae.n_latents=32",
    "sae.k=2",
    "sweep=t",
)

Launch = Callable[..., int]


def train_tiny(out: Path, *arguments: str) -> Path:
    """Train one tiny cell; returns its run directory."""
    from harness.launch import main

    assert main([*TINY, f"out={out}", *arguments]) == 0
    (config,) = out.glob("t/*/config.yaml")
    return config.parent
