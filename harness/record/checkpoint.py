"""Checkpoints: torch.distributed.checkpoint with safetensors storage (nothing is unpickled), on any mesh.

`checkpoints/step-0000001234/` holds safetensors files of each rank and `marker.json` (step, format, run, mesh,
versions, size and hash of every file, and its own hash). The marker is written last, and the directory is then renamed
into place: a directory with its final name is whole. The previous checkpoint is removed only after that.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from harness.budget import CHECKPOINT_FILE_BYTES
from harness.files import fsync_directory, fsync_file, sha256_of, write_json_atomic
from harness.parallel import Shards
from harness.process.together import together
from harness.record.rundir import STEP
from harness.schema import (
    FILE_NAME,
    OBJECT,
    SHA256,
    TEXT,
    Check,
    dict_of,
    fields,
    read_json,
    sealed,
    whole,
    with_seal,
)

FORMAT = 3
"""Raise it when older checkpoints can no longer be continued."""

_FILE = fields({"bytes": whole(), "sha256": SHA256})
_MARKER = fields({"format": whole(), "step": whole(), "run_id": TEXT, "files": dict_of(_FILE, FILE_NAME)})


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint to go on from; with step 0 and no directory, only the ones that were refused."""

    step: int
    directory: Path | None
    extra: dict[str, Any]
    refused: tuple[str, ...]
    """A line per newer checkpoint that was refused, with the reason."""


def _directories(root: Path) -> list[Path]:
    """Checkpoint directories, newest first."""
    if not root.is_dir():
        return []
    return sorted((path for path in root.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()), reverse=True)


def _remove(path: Path) -> None:
    """Remove a directory, or whatever stands in its place; of a symbolic link only the link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # it assumes a single process, which is what we want
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:  # it is no `Exception`, so nothing else would catch it
            cause, _ = next(iter(error.failures.values()))
            raise cause if isinstance(cause, OSError) else OSError(str(cause)) from error


def save_checkpoint(
    root: Path, step: int, views: Mapping[str, Tensor], extra: dict[str, Any], run_id: str, shards: Shards
) -> None:
    """Write the state after `step` completed steps and remove older checkpoints; called by all ranks.

    `views` are whole tensors, or this rank's part as a DTensor (`Shards.global_view`). If the disk is too full, raises
    `OSError` on every rank, naming the directory; the previous checkpoint is then still there.
    """
    final = root / f"step-{step:010d}"
    beside = root / f".{final.name}.tmp"
    stands = False
    with together(shards):
        if shards.rank == 0:
            stands = _problem(final, run_id, OBJECT) is None
            if not stands:
                _prepare(root, beside, views)
    if int(shards.sum_(torch.tensor(int(stands)), "all", "scalars")):
        return  # this attempt began from it; replacing it would leave a moment without any checkpoint
    try:
        with together(shards):
            with _quietly():
                writer = HuggingFaceStorageWriter(str(beside), _files(views), save_distributed=True)
                save(dict(views), storage_writer=writer, no_dist=shards.size == 1)
            own = _described(beside, shards)
        files: dict[str, Any] = {}
        for described in shards.texts(json.dumps(own)):
            files |= json.loads(described)
        with together(shards):
            if shards.rank == 0:
                _commit(root, beside, final, step, extra, run_id, shards, files)
    except BaseException:
        if shards.rank == 0:
            shutil.rmtree(beside, ignore_errors=True)  # on a full disk it is in the way
        raise


def _own_bytes(view: Tensor) -> int:
    """Bytes of this rank's part."""
    return (view.to_local() if isinstance(view, DTensor) else view).nbytes


def _files(views: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor → the file of its rank that it is written to, counted from 1. The first rank decides for all."""
    places: dict[str, int] = {}
    number, size = 1, 0
    for name, view in views.items():
        if size and size + _own_bytes(view) > CHECKPOINT_FILE_BYTES:
            number, size = number + 1, 0
        places[name] = number
        size += _own_bytes(view)
    return places


def _prepare(root: Path, beside: Path, views: Mapping[str, Tensor]) -> None:
    root.mkdir(exist_ok=True)
    for torn in root.glob(".step-*.tmp"):  # left by kills
        _remove(torn)
    needed = sum(view.numel() * view.element_size() for view in views.values())
    free = shutil.disk_usage(root).free
    if free < 1.05 * needed + (1 << 20):
        raise OSError(
            f"no room for a checkpoint in {root}: {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            f"free some space and start the same command again"
        )
    beside.mkdir()


def _described(beside: Path, shards: Shards) -> dict[str, Any]:
    """Size and hash of the files that this rank has written, now on the disk."""
    own = {}
    for file in sorted(beside.glob(f"shard-{shards.rank + 1:05d}-*.safetensors")):
        fsync_file(file)
        own[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return own


def _commit(
    root: Path,
    beside: Path,
    final: Path,
    step: int,
    extra: dict[str, Any],
    run_id: str,
    shards: Shards,
    files: dict[str, Any],
) -> None:
    marker = {
        "format": FORMAT,
        "step": step,
        "run_id": run_id,
        "mesh": {"dp": shards.dp, "shard": shards.shard},
        "torch": torch.__version__,
        "files": dict(sorted(files.items())),
        "extra": extra,
    }
    write_json_atomic(beside / "marker.json", with_seal(marker))
    _remove(final)
    beside.rename(final)
    fsync_directory(root)
    for older in _directories(root):
        if older != final:
            _remove(older)


def _read_marker(directory: Path) -> dict[str, Any]:
    return read_json(directory / "marker.json", _MARKER, "it is not continued")


def _problem(directory: Path, run_id: str, extra: Check) -> str | None:
    """Why the checkpoint cannot be continued, or None."""
    try:
        marker = _read_marker(directory)
        if marker["format"] != FORMAT:
            return f"format {marker['format']}, this version reads {FORMAT}"
        if marker["run_id"] != run_id:
            return f"it belongs to run {marker['run_id']}"
        sealed(fields({"extra": extra}))(marker, "")
        if directory.name != f"step-{marker['step']:010d}":
            return f"its marker tells of step {marker['step']}"
        for name, expected in marker["files"].items():
            file = directory / name
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_of(file) != expected["sha256"]:
                return f"the content of {name} is not what was written"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing"
    except (OSError, ValueError) as problem:
        return str(problem)
    return None


def find_checkpoint(root: Path, run_id: str, shards: Shards, extra: Check = OBJECT) -> Checkpoint | None:
    """The newest whole checkpoint of this format and this run whose `extra` is accepted; None if there is no checkpoint
    at all.

    Rank 0 decides for all.
    """
    refused: list[str] = []
    chosen = -1
    for directory in _directories(root) if shards.rank == 0 else ():
        problem = _problem(directory, run_id, extra)
        if problem is None:
            chosen = _read_marker(directory)["step"]
            break
        refused.append(f"checkpoint {directory.name} refused: {problem}")
    step = int(shards.sum_(torch.tensor(chosen if shards.rank == 0 else 0), "all", "scalars"))
    if step >= 0:
        directory = root / f"step-{step:010d}"
        return Checkpoint(step, directory, _read_marker(directory)["extra"], tuple(refused))
    return Checkpoint(0, None, {}, tuple(refused)) if refused else None


def load_tensors(directory: Path, views: Mapping[str, Tensor], shards: Shards) -> None:
    """Read the checkpoint in `directory` into `views`, in place; any mesh may have written it. Called by all ranks."""
    with _quietly():
        load(dict(views), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=shards.size == 1)


def remove_checkpoints(root: Path) -> None:
    """Remove all checkpoints of a finished run."""
    shutil.rmtree(root, ignore_errors=True)
