"""Open, verify and read a store on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from harness.activations.source import SAMPLE_ROWS
from harness.activations.statistics import Statistics
from harness.activations.store.paths import MANIFEST, MANIFEST_VERSION
from harness.activations.stream import Rows, StoreBatches, Stream
from harness.errors import UserError
from harness.files import write_json_atomic

VERIFIED = "verified.json"
"""Size and modification time of every file when its hash was last checked."""


class Store:
    """An `ActivationSource` backed by a directory of shards.

    Opening checks the size of every file, and its hash unless that was checked before and the file has not been written
    since. Raises `UserError` that names the wrong file.
    """

    dictionary = None

    def __init__(self, directory: Path) -> None:
        manifest = _read_manifest(directory)
        _verify(directory, manifest)
        self.id: str = manifest["id"]
        self.d_model: int = manifest["d_model"]
        self.train_rows: int | None = manifest["rows"]["train"]
        self.heldout_rows: int = manifest["rows"]["heldout"]
        self.description: dict[str, Any] = manifest["description"]
        self._statistics = manifest["statistics"]
        self._means = safetensors.torch.load_file(directory / self._statistics["file"]["file"])
        files = {split: [directory / shard["file"] for shard in shards] for split, shards in manifest["shards"].items()}
        self._train = Rows([_mapped(path, "x") for path in files["train"]])
        self._heldout = Rows([_mapped(path, "x") for path in files["heldout"]])
        self._documents = torch.cat([_mapped(path, "document") for path in files["heldout"]])

    def statistics(self, layernorm: bool) -> Statistics:
        rule = "layernorm" if layernorm else "raw"
        return Statistics(mean=self._means[f"mean_{rule}"], **self._statistics[rule])

    def sample(self) -> Float[Tensor, "rows d"]:
        # the store is shuffled, so its beginning is a fair sample
        return self._train.read(0, min(SAMPLE_ROWS, self._train.total)).float()

    def stream(self, seed: int, batch_tokens: int, device: torch.device, dp_rank: int = 0, dp: int = 1) -> Stream:
        fill = StoreBatches(self._train, seed)
        return Stream(fill, self.d_model, self._train.dtype, batch_tokens, device, dp_rank, dp)

    def heldout(self, batch_rows: int) -> Iterator[tuple[Float[Tensor, "rows d"], Int[Tensor, " rows"]]]:
        for start in range(0, self._heldout.total, batch_rows):
            end = min(start + batch_rows, self._heldout.total)
            yield self._heldout.read(start, end), self._documents[start:end]


def _mapped(path: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, memory-mapped: rows are read when they are used."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {directory} to harvest it again") from error
    if version != MANIFEST_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this program reads {MANIFEST_VERSION}; "
            f"use the version that wrote it, or delete {directory} to harvest it again"
        )
    return manifest


def _verify(directory: Path, manifest: dict[str, Any]) -> None:
    files = [*manifest["shards"]["train"], *manifest["shards"]["heldout"], manifest["statistics"]["file"]]
    again = f"delete {directory} to harvest it again"
    sidecar = directory / VERIFIED
    try:
        earlier = json.loads(sidecar.read_text())
    except (OSError, ValueError):
        earlier = {}
    verified = {}
    for entry in files:
        path = directory / entry["file"]
        if not path.is_file():
            raise UserError(f"the shard {path} is missing; {again}")
        status = path.stat()
        if status.st_size != entry["bytes"]:
            raise UserError(f"the shard {path} has {status.st_size} bytes instead of {entry['bytes']}; {again}")
        verified[entry["file"]] = [status.st_size, status.st_mtime_ns]
        if earlier.get(entry["file"]) != verified[entry["file"]]:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if sha256 != entry["sha256"]:
                raise UserError(f"the shard {path} is damaged (its sha256 is not the manifest's); {again}")
    if verified != earlier:
        try:
            write_json_atomic(sidecar, verified)
        except OSError:
            return  # a store that this user may only read is verified at every opening
