"""Runs that W&B recorded offline, and the command that sends them. Imports no wandb."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.terminal import shown_path

RECORDINGS = "*/wandb/offline-run-*"


def sync_command(sweep_dir: Path) -> str:
    """`wandb sync …` for all runs of a sweep, as it can be pasted here."""
    beside = Path(sys.orig_argv[0] if sys.orig_argv else sys.executable).with_name("wandb")
    wandb = shown_path(beside) if beside.is_file() else "wandb"
    return f"{wandb} sync {shown_path(sweep_dir)}/{RECORDINGS}"


def unsent(sweep_dir: Path) -> bool:
    """Whether a run of the sweep has an offline recording that was not sent."""
    return any(not any(recording.glob("*.synced")) for recording in sweep_dir.glob(RECORDINGS))
