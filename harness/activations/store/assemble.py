"""From unit files to a store: shuffled shards (`store.shards`), statistics, and at last the manifest with a hash of
every file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from harness.activations.lm.contexts import SPLITS, open_contexts, remove_contexts
from harness.activations.statistics import Moments, explained_shares
from harness.activations.store.harvest import OLD_PLAN_FILE, PLAN_FILE, Plan, unit_path
from harness.activations.store.paths import MANIFEST, MANIFEST_VERSION
from harness.activations.store.shards import RECORDS, RULES, dropped_places, records, write_shards
from harness.activations.store.values import Facts, norms, record_values
from harness.activations.store.verify import identity_of
from harness.activations.store.verify import record as record_hashes
from harness.budget import EVALUATION_BATCH
from harness.files import remove_left_behind, sha256_of, write_json_atomic, write_tensors_atomic
from harness.parallel import Shards, Solo
from harness.process.signals import StopFlag
from harness.process.together import in_turns, together
from harness.schema import with_seal

STATISTICS = "statistics.safetensors"


class TornUnits(Exception):
    """A crash damaged unit files. They are removed and must be computed again."""


def assemble(
    plan: Plan,
    directory: Path,
    shard_rows: int,
    description: dict[str, Any],
    stop: StopFlag,
    shards: Shards | None = None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Write shards, statistics and the manifest into `directory`, from its unit files. Returns the manifest on the
    first rank, nothing on others. Called by all ranks.

    Row i of a split goes to its permuted place: that is the global shuffle. Rows whose norm is above
    `plan.largest_norm` are left out and counted. `on_rows`: see `write_shards`. Raises `TornUnits` on every rank,
    `Interrupted` when `stop` is set, and `UserError` for rows that cannot be trained on.
    """
    shards = shards or Solo()
    if shards.rank == 0:
        remove_left_behind(directory)
    _check_units(plan, directory, shards, stop)
    with together(shards, patient=True):
        dropped = dropped_places(plan, directory, stop)
    counts = {split: len(places) for split, places in dropped.items()}
    if plan.largest_norm is not None:
        description = {**description, "outliers": {**description["outliers"], "dropped": counts}}
    plan = plan._replace(rows={split: plan.rows[split] - counts[split] for split in SPLITS})
    with together(shards):
        write_shards(plan, directory, dropped, shard_rows, shards, stop, on_rows)
    manifest: dict[str, Any] = {}
    with together(shards, patient=True):
        if shards.rank == 0:
            manifest = _finish(plan, directory, shard_rows, description)
    return manifest


def _finish(plan: Plan, directory: Path, shard_rows: int, description: dict[str, Any]) -> dict[str, Any]:
    """Statistics and manifest, from the records of all shards. Memory: four bytes per row for the norms."""
    entries: dict[str, list[dict[str, Any]]] = {}
    found: dict[str, dict[str, float]] = {}
    identities: dict[str, list[int]] = {}
    moments = {rule: Moments(plan.d_model) for rule in RULES}
    for split in SPLITS:
        entries[split] = []
        facts: list[Facts] = []
        for record in records(directory, plan, split, shard_rows):
            entries[split].append(record.entry)
            identities[record.entry["file"]] = record.identity
            facts.append(record.facts)
            for rule, sums in record.sums.items():
                moments[rule].add(sums)
        found[split] = norms(split, facts)
    statistics = {rule: moment.result() for rule, moment in moments.items()}
    means = directory / STATISTICS
    write_tensors_atomic(means, {f"mean_{rule}": result.mean for rule, result in statistics.items()})
    contexts = {split: open_contexts(directory, split) for split in SPLITS}
    forwarded = sum(int(contexts[split].offsets[-1]) for split in SPLITS)
    manifest = {
        "schema_version": MANIFEST_VERSION,
        "id": plan.id,
        "recipe": plan.recipe,
        "description": {**description, "norms": found["train"], "harvest_flops": plan.flops_per_token * forwarded},
        "d_model": plan.d_model,
        "dtype": plan.dtype,
        "rows": plan.rows,
        "heldout_documents": len(np.unique(contexts["heldout"].document)),
        "shards": entries,
        "statistics": {
            "file": {"file": means.name, "bytes": means.stat().st_size, "sha256": sha256_of(means)},
            **{
                rule: {
                    "count": result.count,
                    "mean_sq_norm": result.mean_sq_norm,
                    "variance": result.variance,
                    "explained": _explained(directory, entries["heldout"], result.mean, RULES[rule]),
                }
                for rule, result in statistics.items()
            },
        },
    }
    _remove_others(directory, entries)
    record_values(directory, identities)
    record_hashes({**identities, means.name: identity_of(means)}, directory)
    write_json_atomic(directory / MANIFEST, with_seal(manifest))
    return manifest


def _explained(
    directory: Path, entries: list[dict[str, Any]], mean: Float64[Tensor, " d"], layernorm: bool
) -> list[float]:
    """`explained_shares` of the held-out rows."""

    def batches() -> Iterator[Tensor]:
        for entry in entries:
            with safe_open(directory / entry["file"], framework="pt") as file:
                yield from file.get_tensor("x").split(EVALUATION_BATCH)

    shares = explained_shares(batches(), mean, layernorm)
    return [] if bool(shares.isnan().any()) else shares.tolist()


def _remove_others(directory: Path, entries: dict[str, list[dict[str, Any]]]) -> None:
    """Remove shards that an attempt with another `activations.shard_rows` has left."""
    own = {entry["file"] for split in SPLITS for entry in entries[split]}
    for split in SPLITS:
        for path in directory.glob(f"{split}-*.safetensors"):
            if path.name not in own:
                path.unlink()


def remove_scratch(directory: Path) -> None:
    """Remove what only the harvest needed: contexts, units, records and its plan."""
    for folder in ("units", RECORDS):
        shutil.rmtree(directory / folder, ignore_errors=True)
    remove_contexts(directory)
    for name in (PLAN_FILE, OLD_PLAN_FILE):
        (directory / name).unlink(missing_ok=True)


def _check_units(plan: Plan, directory: Path, shards: Shards, stop: StopFlag) -> None:
    """Remove damaged unit files. Raises `TornUnits` on every rank if there was one."""
    units = [(split, unit) for split in SPLITS for unit in range(plan.units(split))]
    torn: list[str] = []

    def check(number: int) -> None:
        path = unit_path(directory, *units[number])
        try:
            with safe_open(path, framework="pt"):
                pass  # opening checks the header against the file's length
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
            torn.append(path.name)

    with together(shards):
        in_turns(len(units), check, shards, stop)
    if int(shards.sum_(torch.tensor(len(torn)), "all", "scalars")):
        raise TornUnits(", ".join(torn) or "units that another rank found")
