"""The mesh benchmark: ranks of its own, counted bytes beside the formula, a network that is measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.bench.mesh import network_table, parse_meshes, predicted_ms, result_table
from harness.errors import UserError


def test_meshes() -> None:
    assert parse_meshes("1x1, 2x4") == [(1, 1), (2, 4)]
    for text in ("2", "0x1", "2x", ""):
        with pytest.raises(UserError, match="is not a mesh"):
            parse_meshes(text)


def test_prediction_is_latency_of_every_exchange_plus_bytes_over_bandwidth() -> None:
    rates = {"small_s": 3e-3, "small_bytes": 1e6, "bytes_per_s": 1e9}  # a latency of 2 ms
    network = {"all_reduce": rates, "all_to_all": rates}
    exchange = {"calls": 3.0, "bytes": 5e6}
    assert predicted_ms("gradients", exchange, network) == pytest.approx(3 * 2 + 5)
    assert predicted_ms("selection", exchange, network) == pytest.approx(2 * 3 * 2 + 5)


def test_results_as_text() -> None:
    network = {"all_reduce": {"small_s": 12e-6, "bytes_per_s": 2e9}}
    assert network_table(2, network).splitlines()[1].split() == ["all_reduce", "2", "12", "2.00"]
    result = {"shape": "C1", "dp": 2, "shard": 1, "step_ms": 3.0, "step_ms_spread": {"q1": 2.5, "q3": 3.5}}
    result |= {"exchange_ms": 1.0, "predicted_exchange_ms": 0.5, "bytes_sent": 1.5e6, "formula_bytes": 1.5e6}
    assert result_table([result]).splitlines()[1].split() == [
        *("C1", "2", "1", "3.0", "2.5–3.5", "1.0", "0.5", "1.500", "1.500"),
    ]


@pytest.mark.slow
@pytest.mark.dist
def test_command_writes_bytes_that_equal_the_formula(tmp_path: Path) -> None:
    out = tmp_path / "mesh.json"
    command = [sys.executable, "-m", "harness.bench.mesh", "--meshes", "1x1,1x2", "--rounds", "3", "--json", str(out)]
    command += ["--shapes", "16x64x4x64,16x64x4x64x4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert [network["ranks"] for network in written["network"]] == [2]
    assert all(rates["bytes_per_s"] > 0 for rates in (written["network"][0][k] for k in ("all_reduce", "all_to_all")))
    assert len(written["results"]) == 4
    for result in written["results"]:
        assert result["bytes_sent"] == pytest.approx(result["formula_bytes"]) and result["step_ms"] > 0
        assert (result["shard"] == 1) == (result["bytes_sent"] == 0)


def test_a_shape_that_a_mesh_cannot_cut_is_refused() -> None:
    command = [sys.executable, "-m", "harness.bench.mesh", "--meshes", "1x3", "--shapes", "16x64x4x64"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "16x64x4x64 cannot be cut 1 × 3" in done.stderr


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interruption_leaves_no_rank(number: signal.Signals) -> None:
    """While the ranks take steps that would never end."""
    command = [sys.executable, "-m", "harness.bench.mesh", "--meshes", "1x2", "--shapes", "16x64x4x64"]
    command += ["--rounds", str(10**9)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    driver, ranks = psutil.Process(process.pid), []
    deadline = time.monotonic() + 120
    while len(ranks) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        ranks = driver.children()
    assert len(ranks) == 2, "the ranks never started"
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert (process.returncode, printed, errors) == (75, "", "interrupted; no file was written\n")
    assert not psutil.wait_procs(ranks, timeout=60)[1]
