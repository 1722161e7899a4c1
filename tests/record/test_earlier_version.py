"""A sweep that an earlier version began and that was killed goes on with this one, bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.launch import main
from harness.record.state import state_of

RECORDED = Path(__file__).parent / "data" / "interrupted_0.1"
TOPK, SWITCH = "topk-n32-k4-s0-4cd563f346", "switch-n32-k4-e4-s0-6608819486"


def processor() -> str:
    """What decides which instructions the kernels use, from /proc/cpuinfo; its name alone is often a hypervisor's."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    kept = ("cpu family", "model", "stepping", "flags")
    return "\n".join(dict.fromkeys(line for line in lines if line.split("\t")[0].strip() in kept))


def same_bits_expected() -> bool:
    """Whether this machine computes the same bits as the one that made the recording."""
    recorded = json.loads((RECORDED / "machine.json").read_text())
    return recorded == {"processor": hashlib.sha256(processor().encode()).hexdigest(), "torch": torch.__version__}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sweep", "arguments", "run_ids"),
    [
        ("alone", ["sweep=alone", "cluster.pack=1", "--only", "sae.architecture=topk"], [TOPK]),
        ("pack", [], [SWITCH, TOPK]),
    ],
)
def test_an_interrupted_sweep_of_version_0_1_goes_on(
    sweep: str, arguments: list[str], run_ids: list[str], tmp_path: Path
) -> None:
    shutil.copytree(RECORDED / sweep, tmp_path / sweep)
    exact = same_bits_expected()
    assert [state_of(tmp_path / sweep / run_id).status for run_id in run_ids] == ["interrupted"] * len(run_ids)
    assert main(["--study", str(RECORDED / "interrupted.yaml"), *arguments, f"out={tmp_path}"]) == 0
    assert sorted(path.parent.name for path in (tmp_path / sweep).glob("*/config.yaml")) == sorted(run_ids)
    for run_id in run_ids:
        result = json.loads((tmp_path / sweep / run_id / "result.json").read_text())
        assert (result["status"], result["steps"], result["attempts"]) == ("done", 3000, 2)
        log = (tmp_path / sweep / run_id / "attempts/2/log.txt").read_text()
        pack_log = "".join(path.read_text() for path in (tmp_path / sweep).glob("_packs/*/attempts/2/log.txt"))
        assert "goes on at step 1500" in log + pack_log
        weights = load_file(tmp_path / sweep / run_id / "sae/sae.safetensors")
        undisturbed = load_file(RECORDED / "undisturbed" / f"{run_id}.safetensors")
        assert weights.keys() == undisturbed.keys()
        for name, expected in undisturbed.items():
            if exact:
                assert torch.equal(weights[name], expected), name
            elif expected.is_floating_point():
                # another processor rounds otherwise, and 1500 steps carry that on
                torch.testing.assert_close(weights[name], expected, rtol=0.05, atol=0.05)
