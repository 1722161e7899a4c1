"""From unit files to a store: shuffled shards, statistics, and at last the manifest with a hash of every file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.activations.lm.contexts import SPLITS, open_contexts, remove_contexts
from harness.activations.source import DTYPES
from harness.activations.statistics import Moments
from harness.activations.store.harvest import OLD_PLAN_FILE, PLAN_FILE, Plan, unit_path
from harness.activations.store.paths import MANIFEST, MANIFEST_VERSION
from harness.activations.store.values import Values
from harness.files import sha256_of, write_json_atomic, write_tensors_atomic
from harness.process.signals import Interrupted, StopFlag
from harness.schema import with_seal

PASS_BYTES = 512 * 2**20
"""Size of the rows that are shuffled in memory at once; at least one shard."""


class TornUnits(Exception):
    """A crash damaged unit files. They are removed and must be computed again."""


def assemble(
    plan: Plan, directory: Path, shard_rows: int, description: dict[str, Any], stop: StopFlag
) -> dict[str, Any]:
    """Write shards, statistics and the manifest into `directory`, from its unit files. Returns the manifest.

    Row i of a split goes to its permuted place: that is the global shuffle. A pass over the units fills the places of a
    few shards, so memory stays bounded and writing is sequential. Raises `TornUnits`, and `Interrupted` when `stop` is
    set, and `UserError` for rows that cannot be trained on.
    """
    _remove_torn(directory)
    _check_units(plan, directory)
    shards: dict[str, list[dict[str, Any]]] = {}
    dropped = {split: _dropped(plan, directory, split) for split in SPLITS}
    if plan.largest_norm is not None:
        counts = {split: len(places) for split, places in dropped.items()}
        description = {**description, "outliers": {**description["outliers"], "dropped": counts}}
    norms: dict[str, dict[str, float]] = {}
    moments = {False: Moments(plan.d_model), True: Moments(plan.d_model)}
    for split in SPLITS:
        shards[split] = []
        values = Values(split)
        for start, tensors in _shuffled(plan, directory, split, dropped[split], shard_rows, stop):
            path = directory / f"{split}-{start // shard_rows:05d}.safetensors"
            values.add(tensors["x"], path)
            shards[split].append({**_write_shard(path, tensors), "rows": len(tensors["x"])})
            if split == "train":
                for layernorm, moment in moments.items():
                    moment.add(tensors["x"], layernorm)
        norms[split] = values.norms()
    statistics = {_rule(layernorm): moment.result() for layernorm, moment in moments.items()}
    means = {f"mean_{rule}": result.mean for rule, result in statistics.items()}
    described = _write_shard(directory / "statistics.safetensors", means)
    contexts = {split: open_contexts(directory, split) for split in SPLITS}
    forwarded = sum(int(contexts[split].offsets[-1]) for split in SPLITS)
    manifest = {
        "schema_version": MANIFEST_VERSION,
        "id": plan.id,
        "recipe": plan.recipe,
        "description": {**description, "norms": norms["train"], "harvest_flops": plan.flops_per_token * forwarded},
        "d_model": plan.d_model,
        "dtype": plan.dtype,
        "rows": {split: plan.rows[split] - len(dropped[split]) for split in SPLITS},
        "heldout_documents": len(np.unique(contexts["heldout"].document)),
        "shards": shards,
        "statistics": {
            "file": described,
            **{
                rule: {"count": result.count, "mean_sq_norm": result.mean_sq_norm, "variance": result.variance}
                for rule, result in statistics.items()
            },
        },
    }
    write_json_atomic(directory / MANIFEST, with_seal(manifest))
    return manifest


def remove_scratch(directory: Path) -> None:
    """Remove what only the harvest needed: contexts, units and its plan."""
    shutil.rmtree(directory / "units", ignore_errors=True)
    remove_contexts(directory)
    for name in (PLAN_FILE, OLD_PLAN_FILE):
        (directory / name).unlink(missing_ok=True)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a file of the store; return its entry in the manifest."""
    write_tensors_atomic(path, tensors)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _remove_torn(directory: Path) -> None:
    """Remove the temporary files of a killed `assemble`: the finished store would keep them."""
    for torn in directory.glob(".*.tmp"):
        torn.unlink()


def _check_units(plan: Plan, directory: Path) -> None:
    torn = []
    for split in SPLITS:
        for unit in range(plan.units(split)):
            path = unit_path(directory, split, unit)
            try:
                with safe_open(path, framework="pt"):
                    pass  # opening checks the header against the file's length
            except (SafetensorError, OSError):
                path.unlink(missing_ok=True)
                torn.append(path.name)
    if torn:
        raise TornUnits(", ".join(torn))


def _dropped(plan: Plan, directory: Path, split: str) -> Int[Tensor, " rows"]:
    """The places, ascending, whose rows were dropped."""
    if plan.largest_norm is None:
        return torch.empty(0, dtype=torch.int64)
    places = []
    for unit in range(plan.units(split)):
        with safe_open(unit_path(directory, split, unit), framework="pt") as file:
            places.append(file.get_tensor("dropped"))
    return torch.cat(places).sort().values


def _shuffled(
    plan: Plan, directory: Path, split: str, dropped: Int[Tensor, " rows"], shard_rows: int, stop: StopFlag
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Shards of a split in order: number of the first row, and the tensors."""
    total = plan.rows[split] - len(dropped)
    row_bytes = plan.d_model * DTYPES[plan.dtype].itemsize
    shards_per_pass = max(1, PASS_BYTES // (shard_rows * row_bytes))
    pass_rows = min(total, shards_per_pass * shard_rows)
    buffer = torch.empty(pass_rows, plan.d_model, dtype=DTYPES[plan.dtype])
    document = torch.empty(pass_rows, dtype=torch.int64)
    for start in range(0, total, pass_rows):
        end = min(start + pass_rows, total)
        for unit in range(plan.units(split)):
            if stop.requested:
                raise Interrupted
            with safe_open(unit_path(directory, split, unit), framework="pt") as file:
                place = file.get_tensor("place")
                place -= torch.searchsorted(dropped, place)  # the rows behind a dropped one move up
                low, high = torch.searchsorted(place, torch.tensor([start, end])).tolist()
                into = place[low:high] - start
                buffer.index_copy_(0, into, file.get_slice("x")[low:high])
                if split == "heldout":
                    document[into] = file.get_slice("document")[low:high]
        for shard in range(start, end, shard_rows):
            rows = slice(shard - start, min(shard + shard_rows, end) - start)
            tensors = {"x": buffer[rows]}
            if split == "heldout":
                tensors["document"] = document[rows]
            yield shard, tensors


def _rule(layernorm: bool) -> str:
    return "layernorm" if layernorm else "raw"
