"""From unit files to shuffled shards: one pass over the units, shared among the ranks, which a kill only delays.

The rows of a unit lie in the order of their places in the store, so the rows of any range of places are one slice of
every unit. Each rank maps every unit once. Then it fills ranges of a few shards: it copies the slices into memory and
writes the shards. All bytes are read once and written once. Rows of massive norm were left out of the units: each later
row moves up by the number of dropped rows before it. Beside each finished shard lies a record with its hash and
the sums that the manifest needs; a shard with a record is not made again.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from harness.activations.lm.contexts import SPLITS
from harness.activations.source import DTYPES
from harness.activations.statistics import Sums, sums_of
from harness.activations.store.harvest import Plan, unit_path
from harness.activations.store.values import Facts, facts_of
from harness.activations.store.verify import identity_of
from harness.errors import UserError
from harness.files import sha256_of, write_tensors_atomic
from harness.parallel import Shards
from harness.process.signals import Interrupted, StopFlag
from harness.process.together import in_turns

ASSEMBLY_BYTES = 2**30
"""Rows that one rank shuffles in memory at a time; at least one shard."""
MAPPED_UNITS = 32_768
"""Units that one rank keeps mapped: half of what Linux allows a process. Of larger stores it maps some again."""
RECORDS = "assembled"
"""Folder of the records, in a half-made store."""

RULES = {"raw": False, "layernorm": True}
"""Name of a normalisation in the manifest → whether rows are normalised one by one."""


class Range(NamedTuple):
    """Places `start` … `end`−1 of a split: a few whole shards, the last one of the split may be shorter."""

    split: str
    start: int
    end: int


class Record(NamedTuple):
    """What is kept of a finished shard."""

    entry: dict[str, Any]
    """Of the manifest: file, bytes, sha256, rows."""
    identity: list[int]
    """Of the file when it was hashed, see `verify.identity`."""
    facts: Facts
    sums: dict[str, Sums]
    """By `RULES`; empty for held-out rows."""


def dropped_places(plan: Plan, directory: Path, stop: StopFlag) -> dict[str, Int[Tensor, " rows"]]:
    """For each split the places, ascending, whose rows the harvest dropped.

    Raises `UserError` if a split has no other rows, and `Interrupted` when `stop` is set.
    """
    dropped = {str(split): torch.empty(0, dtype=torch.int64) for split in SPLITS}
    if plan.largest_norm is None:
        return dropped
    for split in SPLITS:
        places = []
        for number in range(plan.units(split)):
            if stop.requested:
                raise Interrupted
            places.append(_mapped(unit_path(directory, split, number))["dropped"])
        dropped[split] = torch.cat(places).sort().values
        if len(dropped[split]) == plan.rows[split]:
            raise UserError(
                f"all {plan.rows[split]:,} {split} rows have a norm above {plan.largest_norm:g}, so none is left; "
                f"raise activations.outlier_factor"
            )
    return dropped


def ranges(plan: Plan, shard_rows: int) -> list[Range]:
    """How a store is cut for assembly; a function of the plan, so that all ranks agree."""
    row_bytes = plan.d_model * DTYPES[plan.dtype].itemsize
    step = max(1, ASSEMBLY_BYTES // (shard_rows * row_bytes)) * shard_rows
    return [
        Range(split, start, min(start + step, plan.rows[split]))
        for split in SPLITS
        for start in range(0, plan.rows[split], step)
    ]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.safetensors"


def write_shards(
    plan: Plan,
    directory: Path,
    dropped: Mapping[str, Int[Tensor, " rows"]],
    shard_rows: int,
    shards: Shards,
    stop: StopFlag,
    on_rows: Callable[[int], None],
) -> None:
    """Write the shards that are missing in `directory`, with their records. Called by all ranks, which the caller
    has to join.

    `plan.rows` counts the rows without those of `dropped`, see `dropped_places`. `on_rows` gets the number of rows that
    are done, as far as this rank can tell.

    Raises `UserError` for rows that cannot be trained on, and `Interrupted` when `stop` is set.
    """
    (directory / RECORDS).mkdir(exist_ok=True)
    units = functools.lru_cache(MAPPED_UNITS)(_mapped)
    cut = ranges(plan, shard_rows)
    rows = np.cumsum([each.end - each.start for each in cut])

    def work(number: int) -> None:
        split, start, end = cut[number]
        missing = [
            first
            for first in range(start, end, shard_rows)
            if read_record(directory, plan, split, first, shard_rows) is None
        ]
        if missing:
            last = min(missing[-1] + shard_rows, end)
            tensors = _shuffled(plan, Range(split, missing[0], last), dropped[split], units, directory, stop)
            for first in missing:
                own = slice(first - missing[0], min(first + shard_rows, last) - missing[0])
                part = {name: tensor[own] for name, tensor in tensors.items()}
                _write_shard(directory, split, first // shard_rows, first, part)
        on_rows(int(rows[min(number + shards.size, len(cut)) - 1]))

    in_turns(len(cut), work, shards, stop)


def _mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a unit, memory-mapped. That keeps no file descriptor."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def _shuffled(
    plan: Plan,
    part: Range,
    dropped: Int[Tensor, " rows"],
    units: Callable[[Path], dict[str, Tensor]],
    directory: Path,
    stop: StopFlag,
) -> dict[str, Tensor]:
    """The rows of a range in their order; of held-out rows also their documents."""
    count = part.end - part.start
    tensors = {"x": torch.empty(count, plan.d_model, dtype=DTYPES[plan.dtype])}
    if part.split == "heldout":
        tensors["document"] = torch.empty(count, dtype=torch.int64)
    bounds = [_place(row, dropped) for row in (part.start, part.end)]
    for number in range(plan.units(part.split)):
        if stop.requested:
            raise Interrupted
        unit = units(unit_path(directory, part.split, number))
        low, high = np.searchsorted(unit["place"].numpy(), bounds)
        place = unit["place"][low:high]
        into = place - torch.searchsorted(dropped, place) - part.start
        for name, tensor in tensors.items():
            tensor.index_copy_(0, into, unit[name][low:high])
    return tensors


def _place(row: int, dropped: Int[Tensor, " rows"]) -> int:
    """The place, counted with the dropped rows, of a row of the store."""
    return row + bisect.bisect_right(range(len(dropped)), row, key=lambda number: int(dropped[number]) - number)


def _write_shard(directory: Path, split: str, number: int, start: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard, and then its record."""
    path = directory / shard_name(split, number)
    rows = tensors["x"]
    facts = facts_of(rows, path)
    write_tensors_atomic(path, tensors)
    record = {
        "start": torch.tensor(start),
        "identity": torch.tensor(identity_of(path)),
        "sha256": torch.frombuffer(bytearray.fromhex(sha256_of(path)), dtype=torch.uint8),
        "first": facts.first,
        "constant": torch.tensor(facts.constant),
        "norms": torch.from_numpy(facts.norms),
    }
    if split == "train":
        for rule, layernorm in RULES.items():
            sums = sums_of(rows, layernorm)
            record |= {f"{rule}.{name}": torch.from_numpy(values) for name, values in sums._asdict().items()}
    # not durable: a record that a power cut damaged does not count
    write_tensors_atomic(directory / RECORDS / path.name, record, durable=False)


def read_record(directory: Path, plan: Plan, split: str, start: int, shard_rows: int) -> Record | None:
    """The record of the finished shard that begins at place `start`; None if there is none, or one of another cut."""
    name = shard_name(split, start // shard_rows)
    rows = min(shard_rows, plan.rows[split] - start)
    try:
        values = load_file(directory / RECORDS / name)
        identity = identity_of(directory / name)
    except (OSError, SafetensorError):
        return None
    if (int(values["start"]), len(values["norms"]), values["identity"].tolist()) != (start, rows, identity):
        return None  # of another cut, or changed since
    sha256 = bytes(values["sha256"].tolist()).hex()
    facts = Facts(values["first"], bool(values["constant"]), values["norms"].numpy())
    sums = {
        rule: Sums(*(values[f"{rule}.{part}"].numpy() for part in Sums._fields)) for rule in RULES if split == "train"
    }
    return Record({"file": name, "bytes": identity[0], "sha256": sha256, "rows": rows}, identity, facts, sums)


def records(directory: Path, plan: Plan, split: str, shard_rows: int) -> Iterator[Record]:
    """The records of all shards of a split, in order; all are finished."""
    for start in range(0, plan.rows[split], shard_rows):
        record = read_record(directory, plan, split, start, shard_rows)
        if record is None:
            raise OSError(f"{directory / shard_name(split, start // shard_rows)} has changed while it was assembled")
        yield record
