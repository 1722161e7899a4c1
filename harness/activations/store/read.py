"""Open, verify and read a store on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.activations.source import DTYPES, SAMPLE_ROWS
from harness.activations.statistics import Statistics
from harness.activations.store.manifest import read_manifest, require_recipe
from harness.activations.store.values import check_once
from harness.activations.store.verify import VERIFIED, identity, verify
from harness.activations.stream import Rows, StoreBatches, Stream
from harness.config import ActivationsConfig
from harness.errors import UserError
from harness.parallel import Shards
from harness.process.together import together
from harness.progress import Progress


class Store:
    """An `ActivationSource` backed by a directory of shards.

    Opening checks the manifest, the name of the directory, the size of every file, and its hash unless that was checked
    before and the file has not been touched since. Raises `UserError` that names the wrong file.
    """

    dictionary = None

    def __init__(self, directory: Path, verified_manifest: dict[str, Any] | None = None) -> None:
        """`verified_manifest`: what `read_manifest` returned if the files were compared with it already."""
        manifest = verified_manifest
        if manifest is None:
            manifest = read_manifest(directory)
            verify(directory, manifest)
        self.id: str = manifest["id"]
        self.d_model: int = manifest["d_model"]
        self.train_rows: int | None = manifest["rows"]["train"]
        self.heldout_rows: int = manifest["rows"]["heldout"]
        self.description: dict[str, Any] = manifest["description"]
        self._statistics = manifest["statistics"]
        d, dtype, shards = self.d_model, DTYPES[manifest["dtype"]], manifest["shards"]
        means = directory / self._statistics["file"]["file"]
        self._means = {rule: _tensor(means, f"mean_{rule}", (d,), torch.float64) for rule in ("raw", "layernorm")}

        def rows(split: str) -> Rows:
            def load(number: int) -> Tensor:
                entry = shards[split][number]
                return _tensor(directory / entry["file"], "x", (entry["rows"], d), dtype)

            return Rows([entry["rows"] for entry in shards[split]], load, d, dtype)

        self._train, self._heldout = rows("train"), rows("heldout")
        documents = [(directory / each["file"], each["rows"]) for each in shards["heldout"]]
        self._documents = torch.cat(
            [_tensor(path, "document", (count,), torch.int64).clone() for path, count in documents]
        )

    def statistics(self, layernorm: bool) -> Statistics:
        rule = "layernorm" if layernorm else "raw"
        known = self._statistics[rule]
        numbers = {name: known[name] for name in ("count", "mean_sq_norm", "variance")}
        explained = torch.tensor(known["explained"], dtype=torch.float64) if known.get("explained") else None
        return Statistics(mean=self._means[rule], **numbers, explained=explained)

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


def open_store(
    directory: Path, cfg: ActivationsConfig, shards: Shards, out: Path, progress: Progress, *, check_values: bool
) -> Store:
    """The store of `cfg` in `directory`, opened by all ranks of `shards`. Raises `UserError` as `Store` does, and when
    the store was made with other settings. `check_values`: also look at the rows (`check_once`).

    Only the first rank hashes files. Where ranks see other files, such as a copy on their own node, one of each node
    does. `out`: where what was verified is recorded if the store may only be read.
    """
    record = out / "_activations" / f"{directory.name}.{VERIFIED}"
    manifest, seen = {}, 0
    with together(shards, patient=True):
        manifest = read_manifest(directory)
        require_recipe(directory, manifest, cfg)
        if shards.rank == 0:
            seen = _fingerprint(verify(directory, manifest, record, progress))
            if check_values:
                check_once(directory)
    verified = int(shards.sum_(torch.tensor(seen), "all", "scalars"))
    with together(shards, patient=True):
        if _fingerprint(identity(directory, manifest)) != verified:
            verify(directory, manifest, record)
        store = Store(directory, manifest)
    return store


def _fingerprint(files: dict[str, list[int]]) -> int:
    """A number below 2⁵³ for what `identity` returned, so that ranks can compare it."""
    return int.from_bytes(hashlib.sha256(json.dumps(files, sort_keys=True).encode()).digest()[:6])


def _tensor(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of a safetensors file, memory-mapped: rows are read when they are used."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); delete {path.parent} to harvest it again") from error
    if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
        raise UserError(
            f"{path}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} instead of {dtype} of {shape}, as the "
            f"manifest says; delete {path.parent} to harvest it again"
        )
    return tensor
