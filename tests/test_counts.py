"""The counts of the largest study, with rows of a few bytes: units, shards, cells, and few files open at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

UNITS, SHARDS, CELLS = 15_501, 3_815, 10_000
"""Of `gao2024_nk`, and of the largest grid."""
SECONDS = 600

STORE = """
import os, resource, sys
from pathlib import Path
import torch
from harness.activations.store import assemble as assembling, shards
from harness.activations.store.read import Store
from harness.process.signals import StopFlag
from tests.activations.units import UNIT_ROWS, half_made

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
os.fsync = lambda descriptor: None  # the counts are of interest, not the disk
opened = 0


def counted(path, framework, safe_open=shards.safe_open):
    global opened
    opened += 1
    return safe_open(path, framework)


for module in (assembling, shards):
    module.safe_open = counted
directory, units, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rows = (units - 10) * UNIT_ROWS
plan = half_made(directory, rows, 10 * UNIT_ROWS, d_model=1)
assert sum(plan.units(split) for split in plan.rows) == units
shard_rows = rows // count
shards.ASSEMBLY_BYTES = count // 20 * shard_rows * 2  # about twenty ranges
assembling.assemble(plan, directory, shard_rows, {"kind": "lm"}, StopFlag())
assert opened <= 2 * units + 20, opened
assembling.remove_scratch(directory)
store = Store(directory)
assert len(list(directory.glob("*-*.safetensors"))) >= count
stream = store.stream(1, 1000, torch.device("cpu"))
assert all(len(stream.batch(step)) == 1000 for step in range(rows // 1000))
assert sum(len(rows) for rows, _ in store.heldout(100)) == 10 * UNIT_ROWS
"""

CELLS_OF_A_GRID = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from harness.launch import main
sys.exit(main([
    "sae=topk", "activations=synthetic", f"train.seed=range({int(sys.argv[2]) // 100})",
    "sae.n_latents=" + ",".join(str(1024 + 8 * i) for i in range(100)),
    "sae.k=16", "cluster=slurm", "cluster.gpu_type=h100", "--dry-run", f"out={sys.argv[1]}",
]))
"""


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_store_of_as_many_units_and_shards_as_the_largest_study(tmp_path: Path) -> None:
    run(STORE, tmp_path / "store", UNITS, SHARDS)


@pytest.mark.slow
def test_ten_thousand_cells_are_planned(tmp_path: Path) -> None:
    assert f"{CELLS:,} cells" in run(CELLS_OF_A_GRID, tmp_path, CELLS).replace("10000 cells", "10,000 cells")


def test_the_same_with_fewer(tmp_path: Path) -> None:
    run(STORE, tmp_path / "store", 300, 90)
