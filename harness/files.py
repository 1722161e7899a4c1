"""Files that are whole or absent: written beside, fsynced, renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # analysis writes files too, and has no use for three seconds of torch
    from torch import Tensor


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable; a rename is not, until its directory is synced."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_json_atomic(path: Path, content: Any) -> None:
    """`write_text_atomic` of indented JSON; NaN and infinity are refused, JSON has none."""
    write_text_atomic(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def fsync_file(path: Path) -> None:
    """Return when the content of `path` is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_tensors_atomic(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device to a safetensors file; a reader sees the old content or the new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        from safetensors.torch import save_file

        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
        fsync_file(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_directory(path.parent)


def last_line(path: Path, tail_bytes: int = 4096) -> str:
    """The last line of a text that is not empty; an empty string if there is none in the last few kilobytes."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - tail_bytes))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
