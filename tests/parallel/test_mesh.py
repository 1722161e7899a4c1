"""The trajectory does not depend on the mesh: 1, 2 and 4 ranks over gloo against one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.parallel import Solo
from harness.parallel.mesh import Ranks, mesh
from tests.parallel.rank import MESHES, STEPS
from tests.parallel.trajectory import CASES, CPU, case_config, trajectory


def start_ranks(world: int, out: Path) -> None:
    """Run `tests.parallel.rank` on `world` ranks; fails with the output of the first that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error::UserWarning:harness", "-m", "tests.parallel.rank", str(out)]
    ranks = [
        subprocess.Popen(
            command, env=common | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for r in range(world)
    ]
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    failed = [
        f"{rank.args}: {rank.returncode}\n{output}"
        for rank, output in zip(ranks, outputs, strict=True)
        if rank.returncode
    ]
    # a rank that lost its peer is not the cause
    assert not failed, min(failed, key=lambda output: "onnection" in output)


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    results = {name: trajectory(case_config(name), Solo(), STEPS[name]) for name in CASES}
    return results | {"topk_auxk_fp32": trajectory(case_config("topk_auxk", precision="fp32"), Solo(), 200)}


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 4])
def test_every_mesh_gives_the_trajectory_of_one_process(world: int, tmp_path: Path, alone) -> None:
    start_ranks(world, tmp_path)
    for dp, shard in MESHES[world]:
        for name in CASES:
            results = load_file(tmp_path / f"dp{dp}-shard{shard}" / f"{name}.safetensors")
            assert results.keys() == alone[name].keys()
            for part, expected in alone[name].items():
                message = f"{name}, dp={dp}, shard={shard}: {part}"
                if expected.dtype.is_floating_point:
                    torch.testing.assert_close(
                        results[part], expected, rtol=1e-9, atol=1e-9, msg=lambda m, t=message: f"{t}\n{m}"
                    )
                else:
                    assert torch.equal(results[part], expected), message
        results = load_file(tmp_path / f"dp{dp}-shard{shard}" / "topk_auxk_fp32.safetensors")
        expected = float(alone["topk_auxk_fp32"]["fvu"][0])
        assert abs(float(results["fvu"][0]) / expected - 1) < 1e-4


def test_auxk_is_really_at_work_in_these_trajectories(alone) -> None:
    for name in ("topk_auxk", "switch_auxk"):
        assert float(alone[name]["n_dead"].max()) > 0
    assert not torch.equal(alone["topk"]["loss"], alone["topk_auxk"]["loss"])


def test_a_mesh_of_the_wrong_size_is_refused() -> None:
    with (
        pytest.raises(ValueError, match=r"mesh.shard=2 needs 4 ranks, and 1 were started"),
        mesh(2, 2, CPU, Ranks(0, 1, 0)),
    ):
        raise AssertionError("unreachable")
