"""The counts of the largest study, with rows of a few bytes: units, shards, cells, and few files open at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

UNITS, SHARDS, CELLS = 15_501, 3_815, 10_000
"""Of `gao2024_nk`, and of the largest grid."""
RANKS = 64
"""Of `gao2024_16m`."""
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

CHECKPOINT = """
import json, resource, sys
from pathlib import Path
from types import SimpleNamespace
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from harness.parallel import Solo
from harness.record import checkpoint

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
root, ranks = Path(sys.argv[1]), int(sys.argv[2])
parts = ("weights", "exp_avg", "exp_avg_sq", "ema")
names = [f"{part}.{name}" for part in parts for name in ("W_enc", "W_dec", "b_enc")]
whole = {name: torch.arange(4.0 * ranks).add(number).view(2 * ranks, 2) for number, name in enumerate(names)}
beside = root / "beside"
checkpoint._prepare(root, beside, whole)


def views(rank):
    # what the rank of a mesh 1 x ranks hands to the checkpoint; the other ranks do not exist
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    rows = slice(2 * rank, 2 * rank + 2)
    return {
        name: DTensor.from_local(tensor[rows].clone(), mesh, [Shard(0)], run_check=False)
        for name, tensor in whole.items()
    }


# the steps of torch's `save`, one rank after the other
writers, planners, plans = [], [], []
for rank in range(ranks):
    writers.append(HuggingFaceStorageWriter(str(beside), save_distributed=True))
    planners.append(DefaultSavePlanner())
    planners[rank].set_up_planner(views(rank), writers[rank].storage_meta(), rank == 0)
    writers[rank].set_up_storage_writer(rank == 0, rank=rank)
    plans.append(writers[rank].prepare_local_plan(planners[rank].create_local_plan()))
    dist.destroy_process_group()
plans, metadata = planners[0].create_global_plan(plans)
plans = writers[0].prepare_global_plan(plans)
results, files = [], {}
for rank, (writer, planner) in enumerate(zip(writers, planners)):
    plan = planner.finish_plan(plans[rank])
    results.append(writer.write_data(plan, planner).wait())
    files |= checkpoint._described(beside, SimpleNamespace(rank=rank))
writers[0].finish(metadata, results)
mesh = SimpleNamespace(dp=1, shard=ranks)
checkpoint._commit(root, beside, root / "step-0000000007", 7, {}, "run", mesh, files)

assert len(files) == ranks, files.keys()
found = checkpoint.find_checkpoint(root, "run", Solo())
assert found.step == 7 and not found.refused
read = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
checkpoint.load_tensors(found.directory, read, Solo())
assert all(torch.equal(read[name], tensor) for name, tensor in whole.items())
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
def test_a_checkpoint_of_64_ranks_is_read_by_one(tmp_path: Path) -> None:
    run(CHECKPOINT, tmp_path / "checkpoints", RANKS)


@pytest.mark.slow
def test_ten_thousand_cells_are_planned(tmp_path: Path) -> None:
    assert f"{CELLS:,} cells" in run(CELLS_OF_A_GRID, tmp_path, CELLS).replace("10000 cells", "10,000 cells")


def test_the_same_with_fewer(tmp_path: Path) -> None:
    run(STORE, tmp_path / "store", 300, 90)
