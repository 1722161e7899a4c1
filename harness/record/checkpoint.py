"""Checkpoints: tensors in safetensors, the rest in JSON, written beside, renamed, marked last.

`checkpoints/step-00001234/` holds `state.safetensors` and `marker.json`; the marker (step, format, run_id) is
written last inside a directory that is renamed into place, so what has a name is whole. The previous checkpoint goes
only when the new one stands.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness.record.files import fsync_directory, write_json_atomic, write_tensors_atomic

FORMAT = 1
"""Raised when the content changes so that older checkpoints cannot be continued."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    refused: tuple[str, ...]
    """One line for each newer checkpoint that was passed over, with the reason."""


def _directories(root: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True) if root.is_dir() else []


def save_checkpoint(root: Path, step: int, tensors: dict[str, Tensor], extra: dict[str, Any], run_id: str) -> None:
    """Write the state after `step` completed steps and drop older ones. `run_id` names its science.

    Raises `OSError`, naming the directory, when the disk is too full; the previous checkpoint then still stands.
    """
    root.mkdir(exist_ok=True)
    needed = sum(t.numel() * t.element_size() for t in tensors.values())
    free = shutil.disk_usage(root).free
    if free < 1.05 * needed + (1 << 20):
        raise OSError(
            f"no room for a checkpoint in {root}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            f"free some space and start the same command again"
        )
    final = root / f"step-{step:010d}"
    beside = root / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    file = beside / "state.safetensors"
    write_tensors_atomic(file, tensors)
    marker = {"format": FORMAT, "step": step, "run_id": run_id, "bytes": file.stat().st_size, "extra": extra}
    write_json_atomic(beside / "marker.json", marker)
    if final.exists():
        shutil.rmtree(final)
    beside.rename(final)
    fsync_directory(root)
    for older in _directories(root):
        if older != final:
            shutil.rmtree(older)


def load_checkpoint(root: Path, run_id: str) -> Checkpoint | None:
    """The newest checkpoint that is whole, of this format and this run; None if there is none."""
    refused: list[str] = []
    for directory in _directories(root):
        try:
            marker = json.loads((directory / "marker.json").read_text())
            if marker["format"] != FORMAT:
                raise ValueError(f"format {marker['format']}, this version reads {FORMAT}")
            if marker["run_id"] != run_id:
                raise ValueError(f"it belongs to run {marker['run_id']}")
            file = directory / "state.safetensors"
            if file.stat().st_size != marker["bytes"]:
                raise ValueError(f"state.safetensors has {file.stat().st_size} bytes instead of {marker['bytes']}")
            return Checkpoint(marker["step"], load_file(file), marker["extra"], tuple(refused))
        except (OSError, ValueError, KeyError, SafetensorError) as problem:
            refused.append(f"checkpoint {directory.name} refused: {problem}")
    return Checkpoint(0, {}, {}, tuple(refused)) if refused else None


def remove_checkpoints(root: Path) -> None:
    """Drop all checkpoints of a finished run."""
    shutil.rmtree(root, ignore_errors=True)
