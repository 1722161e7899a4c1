"""What can be said of a GPU without one: `dev.step_traffic`, `dev.fp8_encoder`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dev import step_traffic
from dev.fp8_encoder import rounded


@given(st.integers(0, 2**31), st.sampled_from([1e-30, 1.0, 1e20]))
def test_rows_are_rounded_to_fp8(seed: int, size: float) -> None:
    rows = size * torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    rows[1] = 0
    low = rounded(rows)
    assert torch.equal(rounded(low), low)
    assert ((low - rows).abs() <= rows.abs() / 16 + rows.abs().amax(dim=1, keepdim=True) / 2**16).all()
    assert torch.equal(low.bfloat16().float(), low), "products of bfloat16 numbers are of the same numbers"


@pytest.mark.parametrize("share", ["2", "-1", "nan"])
def test_a_share_is_refused_in_one_line(
    share: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step_traffic", "S1", "--dead", share])
    assert step_traffic.main() == 2
    assert capsys.readouterr().err == f"--dead {share} is not a share: give a number from 0 to below 1\n"


def test_what_a_step_launches_and_moves_is_counted() -> None:
    command = [sys.executable, "-m", "dev.step_traffic", "S1", "--dead", "0.05", "--least", "0"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    *listed, _, total = done.stdout.splitlines()
    moved = [(name, float(size)) for _, _, name, size, _ in (line.split() for line in listed)]
    assert {"lanes_kernel", "keep_kernel", "adam_kernel"} <= {name for name, _ in moved} and len(moved) > 90
    # weights, gradients and two moments in float32, a copy in bfloat16
    assert max(size for name, size in moved if name == "adam_kernel") == pytest.approx(32.768 * 0.768 * 18, rel=0.01)
    assert total.split()[:2] == ["S1", str(len(moved))]
    assert float(total.split()[2]) == pytest.approx(sum(size for _, size in moved) / 1e3, abs=0.1)
