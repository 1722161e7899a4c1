"""Assembly: the bytes of earlier versions, one pass over the units, finished shards kept."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.activations.store import assemble as assembling
from harness.activations.store import shards as sharding
from harness.activations.store import values
from harness.activations.store.assemble import assemble, remove_scratch
from harness.activations.store.harvest import Plan
from harness.activations.store.shards import write_shards
from harness.parallel import Solo
from harness.process.signals import Interrupted, StopFlag
from tests.activations.units import half_made

SHARDS_BEFORE = "c66bdb72f1343cec7694015ccccae3f6f6748b5f4614aaf1ac81562508153407"
"""Hash over the hashes of all shards, as the first version of `assemble` wrote them."""
ROW_BYTES = 2 * 4
NONE_DROPPED = {split: torch.empty(0, dtype=torch.int64) for split in ("train", "heldout")}


@pytest.fixture
def made(tmp_path: Path) -> tuple[Plan, Path]:
    return half_made(tmp_path / "made", 5000, 700), tmp_path / "made"


def build(plan: Plan, directory: Path, shard_rows: int = 300, stop: StopFlag | None = None) -> dict:
    assemble(plan, directory, shard_rows, {"kind": "lm"}, stop or StopFlag())
    return json.loads((directory / "manifest.json").read_text())


def digest(manifest: dict) -> str:
    hashes = [shard["sha256"] for split in ("train", "heldout") for shard in manifest["shards"][split]]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


@pytest.mark.parametrize("memory_shards", [1, 5, 1000])
def test_the_store_is_byte_identical_to_that_of_earlier_versions(
    made: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch, memory_shards: int
) -> None:
    monkeypatch.setattr(sharding, "ASSEMBLY_BYTES", memory_shards * 300 * ROW_BYTES)
    manifest = build(*made)
    assert digest(manifest) == SHARDS_BEFORE
    raw = manifest["statistics"]["raw"]
    assert (raw["count"], raw["mean_sq_norm"], raw["variance"]) == (5000, 175.999, 175.998987)
    assert manifest["description"]["norms"]["max"] == 18.947296142578125


def test_a_unit_is_opened_twice_however_little_memory_there_is(
    made: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to see that it is whole, once to read it."""
    monkeypatch.setattr(sharding, "ASSEMBLY_BYTES", 1)
    opened: Counter[str] = Counter()
    for module in (assembling, sharding):
        safe_open = module.safe_open
        monkeypatch.setattr(
            module,
            "safe_open",
            lambda path, framework, s=safe_open: (
                opened.update([path.name] if path.parent.name == "units" else []) or s(path, framework)
            ),
        )
    build(*made)
    plan, _ = made
    assert len(opened) == sum(plan.units(split) for split in plan.rows)
    assert set(opened.values()) == {2}


def test_finished_shards_are_kept_after_a_kill(made: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, directory = made
    monkeypatch.setattr(sharding, "ASSEMBLY_BYTES", 4 * 300 * ROW_BYTES)
    write, calls = sharding.write_tensors_atomic, 0

    def killed(path: Path, tensors: dict, **options: bool) -> None:
        nonlocal calls
        calls += 1
        if calls == 14:  # the record of the seventh shard
            raise KeyboardInterrupt
        write(path, tensors, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sharding, "write_tensors_atomic", killed)
        build(plan, directory)
    finished = {path.name: path.stat().st_mtime_ns for path in (directory / "assembled").iterdir()}
    assert len(finished) == 6
    before = {name: (directory / name).stat().st_mtime_ns for name in finished}
    assert digest(build(plan, directory)) == SHARDS_BEFORE
    assert {name: (directory / name).stat().st_mtime_ns for name in finished} == before


def test_a_stop_ends_assembly_between_two_units(made: tuple[Plan, Path]) -> None:
    class After(StopFlag):
        looks = 0

        @property
        def requested(self) -> bool:
            self.looks += 1
            return self.looks > 300

    with pytest.raises(Interrupted):
        build(*made, stop=After())
    assert not (made[1] / "manifest.json").exists()
    assert digest(build(*made)) == SHARDS_BEFORE


def test_ranks_share_the_shards(made: tuple[Plan, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "ASSEMBLY_BYTES", 2 * 300 * ROW_BYTES)
    plan, directory = made
    written = []
    for rank in range(3):
        one = Solo()
        one.rank, one.size = rank, 3
        write_shards(plan, directory, NONE_DROPPED, 300, one, StopFlag(), lambda rows: None)
        written.append(len(list(directory.glob("*-*.safetensors"))))
    assert written == [8, 15, 20]
    assert digest(build(plan, directory)) == SHARDS_BEFORE


def test_shards_of_another_size_that_a_killed_attempt_left_are_replaced(made: tuple[Plan, Path]) -> None:
    plan, directory = made
    write_shards(plan, directory, NONE_DROPPED, 100, Solo(), StopFlag(), lambda rows: None)
    assert digest(build(plan, directory)) == SHARDS_BEFORE
    remove_scratch(directory)
    assert (
        len(list(directory.iterdir())) == 17 + 3 + 4
    )  # shards, statistics, manifest, and the two records of what was checked


def test_a_record_does_not_stand_for_a_shard_that_is_gone(made: tuple[Plan, Path]) -> None:
    plan, directory = made
    write_shards(plan, directory, NONE_DROPPED, 300, Solo(), StopFlag(), lambda rows: None)
    (directory / "train-00003.safetensors").unlink()
    shutil.copy(directory / "train-00004.safetensors", directory / "train-00005.safetensors")
    assert digest(build(plan, directory)) == SHARDS_BEFORE


def test_squares_are_summed_like_numpy_sums_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_SUMMED_AT_ONCE", 1024)
    numbers = np.sort(np.random.default_rng(0).lognormal(3, 2, 100_003).astype(np.float32))
    assert values._sum_of_squares(numbers) == float(np.square(numbers.astype(np.float64)).sum())
