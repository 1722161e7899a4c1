"""A cell that trains in about a second, and the ways to ask for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.launch import main

TINY = (
    "activations=synthetic",
    "activations.synthetic.d_model=16",
    "activations.synthetic.n_features=32",
    "activations.heldout_tokens=512",
    "train.tokens=4096",
    "train.batch_tokens=256",
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


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Launch tiny cells into `tmp_path`, with further arguments; returns the exit code."""

    def run(*arguments: str) -> int:
        return main([*TINY, f"out={tmp_path}", *arguments])

    return run
